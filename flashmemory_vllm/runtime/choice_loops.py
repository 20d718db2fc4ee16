"""What the device is asked of a step's rows, row by row: as in `residency/quick/`, for `ChoiceQueue`."""

from __future__ import annotations

from typing import NamedTuple

from flashmemory_vllm.residency.quick.compiled import loop
from flashmemory_vllm.residency.types import IntArray, LongArray

# Code is kept with them as they are, so they are told again: first columns of `Ask`, and columns of `Due`
NOT_DONE = NOBODY = -1
ASK_PLACE, ASK_EPOCH, ASK_NUM_TOKENS, ASK_PROMPT_LEN, ASK_NUM_FULL, ASK_SINK_END = range(6)
ASK_IS_NEW, ASK_IS_SCORED, ASK_AT_ONCE = 10, 11, 12
PLACE, EPOCH, STEP, IS_NEW, POSITION, NUM_QUERIES, ELAPSED, NUM_KNOWN, NUM_BLOCKS, FIRST_TILE, SINK_END = range(11)
CAP, LONG_START, NUM_FIELDS = 14, 15, 16


class AccountArrays(NamedTuple):
    """What the host knows of places.

    Attributes:
        remembered_at: int64 `[P]` tokens of each when its memory was last brought up to date.
        known: int32 `[P]` blocks that its memory knows.
        counts: int32 `[P]` selections that it had.
    """

    remembered_at: LongArray
    known: IntArray
    counts: IntArray


class ChoiceRule(NamedTuple):
    """What is the same in every step.

    Attributes:
        num_queries: newest queries that a selection reads; 0: of all tokens since the last one.
        num_kept: most that are kept.
        tile: blocks of a tile.
        is_finite: whether the host knows what memories know.
        goes_on: NUM_KNOWN where it does not.
    """

    num_queries: int
    num_kept: int
    tile: int
    is_finite: bool
    goes_on: int


@loop
def prepare(
    step: int,
    asked: IntArray,
    of: AccountArrays,
    rule: ChoiceRule,
    in_order: IntArray,
    order: IntArray,
    packed: IntArray,
) -> int:
    """As `ChoiceQueue.choose` up to the upload, for rows that have a set and whose lists are in force later.

    Args:
        step: its number.
        asked: int32 `[n, len(Ask)]`.
        of: what is known; changed.
        rule: of all steps.
        in_order: int32 `[n, len(Ask)]`, takes the rows, those that are scored first.
        order: int32 `[n]`, takes which row each of them was.
        packed: int32 `[18 n]`, takes what `ChoiceWork.upload` sends.

    Returns:
        How many rows are scored; NOT_DONE, with nothing changed, if there are other rows.
    """
    num, num_scored, num_tiles = asked.shape[0], 0, 0
    for row in range(num):
        if asked[row, ASK_IS_NEW] or asked[row, ASK_AT_ONCE]:
            return NOT_DONE
        num_scored += asked[row, ASK_IS_SCORED]
    num_first, num_last = 0, num_scored
    for row in range(num):
        is_scored = asked[row, ASK_IS_SCORED]
        at = num_first if is_scored else num_last
        num_first, num_last = num_first + is_scored, num_last + 1 - is_scored
        for column in range(asked.shape[1]):
            in_order[at, column] = asked[row, column]
        order[at] = row
        place, num_tokens, num_full = asked[row, ASK_PLACE], asked[row, ASK_NUM_TOKENS], asked[row, ASK_NUM_FULL]
        fields = packed[at * NUM_FIELDS : (at + 1) * NUM_FIELDS]
        elapsed = num_tokens - of.remembered_at[place]
        newest = rule.num_queries if rule.num_queries > 0 else min(elapsed, rule.num_kept)
        before = of.known[place] if rule.is_finite else rule.goes_on
        after = num_full if is_scored or not rule.is_finite else min(num_full, before)
        fields[PLACE], fields[EPOCH], fields[STEP], fields[IS_NEW] = place, asked[row, ASK_EPOCH], step, 0
        fields[POSITION], fields[NUM_QUERIES] = num_tokens - 1, max(1, newest) * is_scored
        fields[ELAPSED], fields[NUM_KNOWN], fields[NUM_BLOCKS] = elapsed, before, after
        for column in range(SINK_END, LONG_START):
            fields[column] = asked[row, ASK_SINK_END + column - SINK_END]
        # Those that are scored come in the order of their tiles
        fields[FIRST_TILE], fields[LONG_START] = num_tiles * is_scored, NOBODY
        num_tiles += -(-after // rule.tile) * is_scored
        packed[NUM_FIELDS * num + at] = of.counts[place]
        packed[(NUM_FIELDS + 1) * num + at] = asked[row, ASK_PROMPT_LEN]
        of.counts[place] += is_scored
        if rule.is_finite:
            of.known[place] = after
        if is_scored:
            of.remembered_at[place] = num_tokens
    return num_scored
