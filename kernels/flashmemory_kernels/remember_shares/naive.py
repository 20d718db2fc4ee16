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
            fade = decay.pow(due[:, Due.ELAPSED, None])
            stored = memory[channel, group][place, :span]
            old = torch.nn.functional.pad(stored, (0, width - span)).masked_fill(~is_known, 0.0)
            value, over_time = by_heads[mode % 3], mode // 3
            if over_time == 0:
                new = torch.maximum(old * fade, (value * weight).amax(1))
            elif over_time == 1:
                new = old * fade + (value * weight).sum(1)
            else:
                new = (old.square() * fade + (1 - decay) * (value.square() * weight).sum(1)).sqrt()
            memory[channel, group, place, :span] = torch.where(is_scored[:, :span], new[:, :span], stored)


def _combined(shares: torch.Tensor, heads: int) -> torch.Tensor:
    """Shares [m, H, Q, W'] of a group's heads as one, by the place of the way in `Heads`."""
    if heads == 0:
        return shares.amax(1)
    return shares.mean(1) if heads == 1 else shares.square().mean(1).sqrt()
