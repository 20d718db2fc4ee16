"""Rows that begin blocks, one after the other: for `DecodeRows`."""

from __future__ import annotations

from flashmemory_vllm.residency.quick.arrays import TableArrays
from flashmemory_vllm.residency.quick.compiled import loop
from flashmemory_vllm.residency.types import IntArray

# As in `change_loops.py`, and told again for the same reason
NOT_DONE, NULL_SLOT = -1, 0


@loop
def may_grow(
    place: IntArray, first: IntArray, end: IntArray, num_tokens: IntArray, most_recent: IntArray, table: TableArrays
) -> int:
    """Whether rows may begin their blocks: see `grow`. How many blocks they begin; NOT_DONE if a table forbids it."""
    num = 0
    for row in range(place.size):
        if table.num_entries[place[row]] == 0:
            continue
        num_begun, recent = end[row] - first[row], most_recent[num_tokens[row]]
        if num_begun > 0:
            num += num_begun
            room = table.position.shape[1] - table.num_entries[place[row]]
            if not 1 <= recent <= table.recent[place[row]] + num_begun:
                return NOT_DONE
            if num_begun > room or end[row] > table.ids.shape[1]:
                return NOT_DONE
    return num


@loop
def grow(
    place: IntArray,
    first: IntArray,
    end: IntArray,
    num_tokens: IntArray,
    most_recent: IntArray,
    table: TableArrays,
    begun: IntArray,
    edited: IntArray,
) -> None:
    """As `Entries.append` and `keep_recent`, of rows that have a table.

    Args:
        place: int32 `[n]` of the rows of a step.
        first: int32 `[n]` blocks that each row begins: the first.
        end: int32 `[n]` behind the last.
        num_tokens: int32 `[n]` of each after the step.
        most_recent: int32 `[m]` blocks that keep their order, by the number of tokens.
        table: of a group.
        begun: int32 `[2, k]` takes places and positions of blocks that are begun, with the null slot in their tables.
        edited: int32 `[2, k]` takes places and entries.
    """
    num = 0
    for row in range(place.size):
        own = place[row]
        if table.num_entries[own] == 0 or first[row] >= end[row]:
            continue
        for position in range(first[row], end[row]):
            at = table.num_entries[own]
            table.position[own, at], table.slot[own, at], table.entry[own, position] = position, NULL_SLOT, at
            table.num_entries[own] += 1
            begun[0, num], begun[1, num], edited[0, num], edited[1, num] = own, position, own, at
            num += 1
        table.recent[own] = most_recent[num_tokens[row]]
