"""What most lists change in the books, one block after the other: for `Books.apply`."""

from __future__ import annotations

from typing import NamedTuple

from flashmemory_vllm.residency.quick.arrays import TableArrays
from flashmemory_vllm.residency.quick.compiled import loop
from flashmemory_vllm.residency.slot_arrays import SlotArrays
from flashmemory_vllm.residency.types import IntArray

# Code is kept with them as they are, so what others use is told again
NOBODY = NO_ENTRY = NOT_RESIDENT = NOT_QUEUED = -1
NULL_SLOT, HEADER, IS_NEW = 0, 6, 10
# In `entry` while a list is checked: who comes, and who goes from entry n as GOES - n
COMES, GOES = -2, -3
# What is done, left to others, and what should have been impossible
NOT_DONE, BROKEN = -1, -2
# Of `SlotTable` counts, and of the ends of `IdleQueue`
PINNED = 1
HEAD, TAIL, STAMP = 0, 1, 2


class Scratch(NamedTuple):
    """Where loops write what they return.

    Attributes:
        edited: int32 `[2, E]` place and entry.
        awaited: int32 `[2, M]` place and position.
        idle: int32 `[M]` slots that are given up.
    """

    edited: IntArray
    awaited: IntArray
    idle: IntArray


@loop
def put_in_order(numbers: IntArray, count: int) -> None:
    """Sort the first numbers, by Shell's method: they are few, and numba's own takes a second to compile."""
    gap = count // 2
    while gap > 0:
        for end in range(gap, count):
            number, at = numbers[end], end
            while at >= gap and numbers[at - gap] > number:
                numbers[at] = numbers[at - gap]
                at -= gap
            numbers[at] = number
        gap //= 2


@loop
def read_pairs(step: int, rows: IntArray, asked: IntArray, group: int, table: TableArrays, pairs: IntArray) -> int:
    """As `pairs_of`, for rows of tenants that are there.

    Args:
        step: whose list it is.
        rows: int32 `[n, G, 6 + 2 L]`.
        asked: int32 `[n, len(Ask)]` of the same rows.
        group: layer group.
        table: of the group.
        pairs: takes them.

    Returns:
        How many they are; NOT_DONE if the list is another one, or a row has no set yet, or more blocks than its set.
    """
    num, longest = 0, (rows.shape[2] - HEADER) // 2
    for row in range(rows.shape[0]):
        place, epoch, comes, goes = rows[row, group, 0], rows[row, group, 1], rows[row, group, 3], rows[row, group, 4]
        if place != asked[row, 0] or epoch != asked[row, 1] or rows[row, group, 2] != step:
            return NOT_DONE
        if asked[row, IS_NEW]:
            return NOT_DONE
        if not 0 <= place < table.epoch.size or min(comes, goes) < 0 or max(comes, goes) > longest:
            return NOT_DONE
        if table.epoch[place] != epoch:
            continue
        most = max(comes, goes)
        if table.is_wide[place] or num + most > pairs.shape[1]:
            return NOT_DONE
        for at in range(most):
            come = rows[row, group, HEADER + at] if at < comes else NOBODY
            go = rows[row, group, HEADER + longest + at] if at < goes else NOBODY
            if come == NOBODY and go == NOBODY:
                return NOT_DONE
            pairs[0, num], pairs[1, num], pairs[2, num] = place, come, go
            num += 1
    return num


@loop
def follows(pairs: IntArray, num: int, table: TableArrays, slots: SlotArrays, most_edits: int) -> bool:
    """As `Books._check`: whether changes follow from the sets in force; and whether they are no more than that many."""
    num_edits, index, is_right = 0, 0, True
    while is_right and index < num:
        place, come, go = pairs[0, index], pairs[1, index], pairs[2, index]
        sink, end = table.sink[place], table.num_entries[place] - table.recent[place]
        num_edits += 1 if NOBODY not in (come, go) else 1 + table.recent[place]
        is_right = table.num_entries[place] > 0 and num_edits <= most_edits
        if is_right and come != NOBODY:
            is_right = sink <= come < table.ids.shape[1] and come < table.position[place, end]
            is_right = is_right and table.entry[place, come] == NO_ENTRY
            is_right = is_right and slots.lut[table.ids[place, come]] != NULL_SLOT
            if is_right:
                table.entry[place, come] = COMES
        if is_right and go != NOBODY:
            is_right = 0 <= go < table.ids.shape[1]
            is_right = is_right and sink <= table.entry[place, go] < end
            if is_right:
                slot = slots.lut[table.ids[place, go]]
                is_right = slot > NULL_SLOT and slots.pins[slot] > 0
                table.entry[place, go] = GOES - table.entry[place, go]
        index += 1
    for done in range(index):  # the marks go
        place = pairs[0, done]
        for column in (1, 2):
            position = pairs[column, done]
            if 0 <= position < table.ids.shape[1]:
                at = table.entry[place, position]
                if at == COMES:
                    table.entry[place, position] = NO_ENTRY
                elif at <= GOES:
                    table.entry[place, position] = GOES - at
    return is_right


@loop
def join(slots: SlotArrays, idle: IntArray, count: int) -> None:
    """As `IdleQueue.add`."""
    head, tail = slots.ends[HEAD], slots.ends[TAIL]
    if tail + count > slots.queued.size:
        kept = 0
        for at in range(head, tail):
            if slots.stamp_of[slots.queued[at]] == slots.stamps[at]:
                slots.queued[kept], slots.stamps[kept] = slots.queued[at], slots.stamps[at]
                kept += 1
        head, tail = 0, kept
    slots.ends[STAMP] += 1
    for index in range(count):
        slots.queued[tail + index], slots.stamps[tail + index] = idle[index], slots.ends[STAMP]
        slots.stamp_of[idle[index]] = slots.ends[STAMP]
    slots.ends[HEAD], slots.ends[TAIL] = head, tail + count


@loop
def pin(slots: SlotArrays, slot: int) -> None:
    """As `SlotTable.pin`."""
    if slots.pins[slot] == 0:
        slots.counts[PINNED] += 1
        slots.stamp_of[slot] = NOT_QUEUED
    slots.pins[slot] += 1


@loop
def claim(place: int, come: int, table: TableArrays, slots: SlotArrays, awaited: IntArray, num: int) -> int:
    """As `Books._claim`; how many blocks wait for a slot now."""
    slot = slots.lut[table.ids[place, come]]
    if slot != NOT_RESIDENT:
        pin(slots, slot)
        return num
    awaited[0, num], awaited[1, num] = place, come
    return num + 1


@loop
def give_up(pairs: IntArray, num: int, table: TableArrays, slots: SlotArrays, clock: int, idle: IntArray) -> bool:
    """As `SlotTable.unpin` for all that go; false if a slot has fewer pins than tables that name it."""
    num_idle = 0
    for index in range(num):
        if pairs[2, index] != NOBODY:
            slot = slots.lut[table.ids[pairs[0, index], pairs[2, index]]]
            if slots.pins[slot] == 0:
                return False
            slots.pins[slot] -= 1
            if slots.pins[slot] == 0:
                idle[num_idle] = slot
                num_idle += 1
    put_in_order(idle, num_idle)
    for index in range(num_idle):
        slots.last_read[idle[index]] = max(slots.last_read[idle[index]], clock - 1)
    slots.counts[PINNED] -= num_idle
    join(slots, idle, num_idle)
    return True


@loop
def insert(place: int, come: int, table: TableArrays, slots: SlotArrays, edited: IntArray, num: int) -> int:
    """As `Entries.insert`; how many entries are edited now."""
    count, first = table.num_entries[place], table.num_entries[place] - table.recent[place]
    for at in range(count, first, -1):
        table.position[place, at], table.slot[place, at] = table.position[place, at - 1], table.slot[place, at - 1]
        table.entry[place, table.position[place, at]] = at
        edited[0, num], edited[1, num] = place, at
        num += 1
    table.position[place, first], table.entry[place, come] = come, first
    table.slot[place, first] = max(slots.lut[table.ids[place, come]], NULL_SLOT)
    table.num_entries[place] = count + 1
    edited[0, num], edited[1, num] = place, first
    return num + 1


@loop
def remove(place: int, go: int, table: TableArrays, edited: IntArray, num: int) -> int:
    """As `Entries.remove`; how many entries are edited now."""
    count, first, gap = table.num_entries[place], table.num_entries[place] - table.recent[place], table.entry[place, go]
    table.position[place, gap], table.slot[place, gap] = table.position[place, first - 1], table.slot[place, first - 1]
    table.entry[place, table.position[place, gap]] = gap
    table.entry[place, go] = NO_ENTRY
    edited[0, num], edited[1, num] = place, gap
    for at in range(first - 1, count - 1):
        table.position[place, at], table.slot[place, at] = table.position[place, at + 1], table.slot[place, at + 1]
        table.entry[place, table.position[place, at]] = at
        edited[0, num + at - first + 2], edited[1, num + at - first + 2] = place, at
    table.num_entries[place] = count - 1
    return int(num + 1 + count - first)


@loop
def change(
    pairs: IntArray, num: int, table: TableArrays, slots: SlotArrays, clock: int, scratch: Scratch
) -> tuple[int, int]:
    """As `Books._change`, for changes that follow.

    Returns:
        How many blocks stand in `scratch.awaited`, with the null slot in their tables, and entries in `scratch.edited`;
        BROKEN if a slot has fewer pins than tables that name it.
    """
    awaited, edited, num_awaited, num_edited = scratch.awaited, scratch.edited, 0, 0
    # First those that come: one that goes from a row may come into another
    for index in range(num):
        if NOBODY not in (pairs[1, index], pairs[2, index]):
            num_awaited = claim(pairs[0, index], pairs[1, index], table, slots, awaited, num_awaited)
    if not give_up(pairs, num, table, slots, clock, scratch.idle):
        return BROKEN, 0
    for index in range(num):
        place, come, go = pairs[0, index], pairs[1, index], pairs[2, index]
        if NOBODY not in (come, go):
            at, slot = table.entry[place, go], slots.lut[table.ids[place, come]]
            table.position[place, at], table.slot[place, at] = come, max(slot, NULL_SLOT)
            table.entry[place, go], table.entry[place, come] = NO_ENTRY, at
            edited[0, num_edited], edited[1, num_edited] = place, at
            num_edited += 1
    for index in range(num):
        if pairs[2, index] == NOBODY:
            num_awaited = claim(pairs[0, index], pairs[1, index], table, slots, awaited, num_awaited)
            num_edited = insert(pairs[0, index], pairs[1, index], table, slots, edited, num_edited)
    for index in range(num):
        if pairs[1, index] == NOBODY:
            num_edited = remove(pairs[0, index], pairs[2, index], table, edited, num_edited)
    return num_awaited, num_edited
