"""Specification and CPU path of `remember_shares`."""

import torch

from flashmemory_kernels.common.due_rows import Due, padded_mass, scored_rows
from flashmemory_kernels.remember_shares.channels import Channels


def remember_shares_naive(
    mass: torch.Tensor,
    lse: torch.Tensor,
    rows: torch.Tensor,
    groups: torch.Tensor,
    channels: Channels,
    memory: torch.Tensor,
) -> None:
    """See `op.remember_shares`."""
    indices = scored_rows(rows)
    due = rows[indices]
    log_mass = padded_mass(mass, due)
    width = log_mass.shape[3]
    shares = (log_mass - lse[indices].unsqueeze(3)).exp_()
    shares = shares.masked_fill_(shares.isnan(), 0.0)
    # Heads by layer, [m, A, Hq, Q, W']
    shares = shares.view(len(due), len(groups), mass.shape[1] // len(groups), *log_mass.shape[2:])
    age = torch.arange(mass.shape[2], device=mass.device)
    is_query = age < due[:, Due.NUM_QUERIES, None]  # [m, Q]
    column = torch.arange(width, device=mass.device)
    is_known, is_scored = column < due[:, Due.NUM_KNOWN, None], column < due[:, Due.NUM_BLOCKS, None]
    place, span = due[:, Due.PLACE].long(), min(width, memory.shape[3])
    modes = channels.modes.tolist()
    for group in range(memory.shape[1]):
        members = shares[:, groups == group].flatten(1, 2)
        by_heads = {heads: _combined(members, heads) for heads in {mode % 3 for mode in modes}}
        for channel, (decay, mode) in enumerate(zip(channels.decays, modes, strict=True)):
            weight = (decay.pow(age) * is_query).unsqueeze(2)
            stored = memory[channel, group][place, :span]
            old = torch.nn.functional.pad(stored, (0, width - span)).masked_fill(~is_known, 0.0)
            new = remembered(old, by_heads[mode % 3], weight, due[:, Due.ELAPSED, None], decay, mode // 3)
            memory[channel, group, place, :span] = torch.where(is_scored[:, :span], new[:, :span], stored)


def _combined(shares: torch.Tensor, heads: int) -> torch.Tensor:
    """Shares [m, H, Q, W'] of a group's heads as one, by the place of the way in `Heads`."""
    if heads == 0:
        return shares.amax(1)
    return shares.mean(1) if heads == 1 else shares.square().mean(1).sqrt()


def remembered(
    old: torch.Tensor,
    shares: torch.Tensor,
    weight: torch.Tensor,
    elapsed: torch.Tensor,
    decay: torch.Tensor,
    over_time: int,
) -> torch.Tensor:
    """What a channel remembers [..., W] after some queries.

    Args:
        old: [..., W], what it remembered, 0 for blocks that it did not know.
        shares: [..., Q, W], what the queries paid, heads combined.
        weight: broadcasts with them: of each query, `decay` to the power of its age, or 0.
        elapsed: tokens since `old`; broadcasts with it.
        decay: factor a token.
        over_time: place of the way in `OverTime`.
    """
    fade = decay.pow(elapsed)
    if over_time == 0:
        return torch.maximum(old * fade, (shares * weight).amax(-2))
    if over_time == 1:
        return old * fade + (shares * weight).sum(-2)
    return (old.square() * fade + (1 - decay) * (shares.square() * weight).sum(-2)).sqrt()
