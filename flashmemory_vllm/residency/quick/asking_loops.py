"""Which rows are chosen for after a step, row by row: for `Asking`."""

from __future__ import annotations

from typing import NamedTuple

from flashmemory_vllm.residency.quick.compiled import loop
from flashmemory_vllm.residency.types import BoolArray, IntArray

# As in `change_loops.py`, and told again for the same reason; so are columns of `Ask` and of a frame
NOT_DONE = -1
PLACE, EPOCH, NUM_TOKENS, PROMPT_LEN, NUM_FULL, SINK_END, CAP, IS_NEW, IS_SCORED, AT_ONCE = (
    0,
    1,
    2,
    3,
    4,
    5,
    9,
    10,
    11,
    12,
)
FIRST_RECENT_OF, END_OF, WANT_OF = 1, 2, 3


class AskingArrays(NamedTuple):
    """What `Asking` knows by place, by its names there, and tenants; then `RequestRegistry.frames` by tokens."""

    epoch: IntArray
    tenant: IntArray
    phase: IntArray
    until: IntArray
    opening: IntArray
    prompt_len: IntArray
    frame: IntArray
    lacks_chosen: BoolArray
    budget: IntArray
    sink: IntArray
    recent: IntArray


class RowArrays(NamedTuple):
    """Arrays of `ScheduledRows`, by their names there."""

    place: IntArray
    num_tokens_after: IntArray
    first_fresh: IntArray
    end: IntArray
    num_full: IntArray


@loop
def ask(rows: RowArrays, of: AskingArrays, block_size: int, tau: int, max_fetches: int, fields: IntArray) -> int:
    """As `Asking.asked`, for rows none of which may be asked for the first time.

    Args:
        rows: of a step.
        of: what is known; changed.
        block_size: tokens in a block.
        tau: see `Asking`.
        max_fetches: see `Asking`.
        fields: int32 `[n, len(Ask)]`, takes those that are asked for, at its beginning.

    Returns:
        How many they are; NOT_DONE, with nothing changed, if a row may be asked for the first time.
    """
    for index in range(rows.place.size):
        place = rows.place[index]
        is_other = of.tenant[place] != of.epoch[place]
        if is_other or (of.phase[place] < 0 and rows.num_tokens_after[index] > of.until[place]):
            return NOT_DONE
    num = num_fetching = 0
    for index in range(rows.place.size):
        place, after = rows.place[index], rows.num_tokens_after[index]
        if of.phase[place] < 0:
            continue
        begins, is_opening = rows.first_fresh[index] < rows.end[index], of.opening[place] > 0
        if begins:
            set_frame(place, after, of, block_size)
        of.opening[place] -= is_opening
        is_due = not is_opening and after % tau == of.phase[place]
        fetches = is_due or (not is_opening and of.lacks_chosen[place])
        if not (is_opening or fetches or begins):
            continue
        of.lacks_chosen[place] = of.lacks_chosen[place] and is_opening
        num_fetching += fetches
        fields[num, PLACE], fields[num, EPOCH], fields[num, NUM_TOKENS] = place, of.tenant[place], after
        fields[num, PROMPT_LEN], fields[num, NUM_FULL] = of.prompt_len[place], rows.num_full[index]
        for column in range(of.frame.shape[1]):
            fields[num, SINK_END + column] = of.frame[place, column]
        # Of rows that fetch their share, once it is known
        fields[num, CAP] = of.frame[place, END_OF] if is_opening else -int(fetches)
        fields[num, IS_NEW], fields[num, IS_SCORED], fields[num, AT_ONCE] = 0, is_opening or is_due, is_opening
        num += 1
    share = max(1, max_fetches // max(1, num_fetching))
    for index in range(num):
        if fields[index, CAP] < 0:
            fields[index, CAP] = share
    return num


@loop
def set_frame(place: int, num_tokens: int, of: AskingArrays, block_size: int) -> None:
    """As `Asking._set_frame`."""
    frame, end = of.frame[place], -(-num_tokens // block_size)
    frame[END_OF], frame[FIRST_RECENT_OF] = end, max(0, end - of.recent[num_tokens])
    frame[0] = min(of.sink[num_tokens], frame[FIRST_RECENT_OF])
    frame[WANT_OF] = of.budget[num_tokens] - frame[0] - (end - frame[FIRST_RECENT_OF])
