"""Specification and CPU path of `choose_sets`."""

from typing import Literal, NamedTuple

import torch

from flashmemory_kernels.common.due_rows import Due

# Fields before the positions in a row of the short list: place, epoch, step, how many come, go and are worth a slot.
LIST_HEADER = 6
COMES, GOES, WORTH = 3, 4, 5


class ChoicePolicy(NamedTuple):
    """How a block's worth follows from what is remembered of it.

    Attributes:
        combine: whether channels are added up, each with its weight, or the largest counts.
        successor: of a block's worth, to the block behind it.
        hysteresis: bonus of a block in the set, as a share of its worth.
        threshold: worth, without that bonus, from which a block is worth a slot. Default: 0, every block is.
    """

    combine: Literal["sum", "max"] = "sum"
    successor: float = 0.0
    hysteresis: float = 0.0
    threshold: float = 0.0


def choose_sets_naive(
    memory: torch.Tensor,
    in_set: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    policy: ChoicePolicy,
    short_list: torch.Tensor,
    long_list: torch.Tensor,
) -> None:
    """See `op.choose_sets`."""
    short_list[:, :, 0] = rows[:, Due.PLACE, None]
    (indices,) = torch.nonzero(rows[:, Due.PLACE] >= 0, as_tuple=True)
    due = rows[indices]
    num_listed, places = (short_list.shape[2] - LIST_HEADER) // 2, due[:, Due.PLACE].long()

    def field(name: Due) -> torch.Tensor:
        return due[:, name].view(1, -1, 1)

    column = torch.arange(memory.shape[3], dtype=torch.int32, device=memory.device)
    sink_end, first_recent, end = field(Due.SINK_END), field(Due.FIRST_RECENT), field(Due.END)
    is_candidate = (column >= sink_end) & (column < first_recent)  # [1, n, W]
    far = (in_set[:, places] != 0) & (field(Due.IS_NEW) == 0) & is_candidate  # [G, n, W]
    is_scored = column < field(Due.NUM_BLOCKS)
    value = _value(memory[:, :, places], weights, is_scored, policy)
    worth = torch.where(is_scored, value * (1.0 + policy.hysteresis * far), torch.inf)
    # Distinct, and of equal worth the newer block is better.
    key = (worth.view(torch.int32).long() << 31) | column
    is_worth = is_candidate & (~is_scored | (value >= policy.threshold))
    num_far, num_worth = far.sum(2, keepdim=True), is_worth.sum(2, keepdim=True)
    num_chosen = torch.minimum(field(Due.WANT), num_worth)
    coming = _best(key, is_worth, num_chosen) & ~far
    is_long = field(Due.LONG_START) >= 0
    room = torch.where(is_long, column.numel(), (num_chosen + num_listed - num_far).clamp(0, num_listed))
    num_coming = torch.minimum(coming.sum(2, keepdim=True), torch.minimum(field(Due.CAP), room))
    coming = _best(key, coming, num_coming)
    num_going = (num_far + num_coming - num_chosen).clamp(min=0)
    num_going = torch.where(is_long, num_going, num_going.clamp(max=num_listed))
    going = far & ~_best(key, far, num_far - num_going)
    forced = (column < sink_end) | ((column >= first_recent) & (column < end))
    in_set[:, places] = ((far & ~going) | coming | forced).to(in_set.dtype)
    numbers = torch.cat((num_coming, num_going, num_worth), dim=2).int()  # [G, n, 3]
    short_list[indices, :, 1:3] = due[:, None, Due.EPOCH : Due.STEP + 1]
    short_list[indices, :, COMES : WORTH + 1] = numbers.transpose(0, 1)
    for group, row in torch.cartesian_prod(torch.arange(len(in_set)), torch.arange(len(due))).tolist():
        both = [torch.nonzero(side[group, row])[:, 0].int() for side in (coming, going)]
        start = int(due[row, Due.LONG_START])
        if start >= 0:
            start += group * int(due[row, Due.FIRST_RECENT] - due[row, Due.SINK_END])
            listed = torch.cat(both)
            long_list[start : start + len(listed)] = listed
        else:
            for first, side in zip((LIST_HEADER, LIST_HEADER + num_listed), both, strict=True):
                short_list[indices[row], group, first : first + len(side)] = side


def _value(
    remembered: torch.Tensor, weights: torch.Tensor, is_scored: torch.Tensor, policy: ChoicePolicy
) -> torch.Tensor:
    """Worth [G, n, W] of blocks without their bonus, never negative; 0 where nothing is known."""
    value = torch.zeros_like(remembered[0])
    for weight, channel in zip(weights, remembered, strict=True):
        own = torch.where(is_scored, channel, 0.0).nan_to_num(nan=0.0) * weight
        value = value + own if policy.combine == "sum" else torch.maximum(value, own)
    value = torch.maximum(value, policy.successor * torch.nn.functional.pad(value, (1, -1)))
    return torch.where(value > 0, value, 0.0)


def _best(key: torch.Tensor, mask: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The `count` [G, n, 1] largest keys within the mask."""
    order = torch.where(mask, key, -1).argsort(2, descending=True)
    place = torch.arange(order.shape[2], device=order.device).expand_as(order).contiguous()
    return mask & (torch.empty_like(order).scatter_(2, order, place) < count)
