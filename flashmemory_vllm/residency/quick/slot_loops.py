"""What gives slots to the blocks of a step, one after the other: for `Books.settle`."""

from __future__ import annotations

from typing import NamedTuple

from flashmemory_vllm.residency.quick.arrays import TableArrays
from flashmemory_vllm.residency.quick.compiled import loop
from flashmemory_vllm.residency.slot_arrays import SlotArrays
from flashmemory_vllm.residency.types import IntArray, LongArray

# As in `change_loops.py`, and told again for the same reason
NOT_RESIDENT = NO_OWNER = NOT_QUEUED = -1
NOT_DONE, BROKEN = -1, -2
USED, PINNED = 0, 1
HEAD, TAIL = 0, 1


class Given(NamedTuple):
    """Where loops write what they return.

    Attributes:
        missing: int32 `[2, M]` blocks and the slots that they are given.
        ages: int64 `[2, M]` of evicted blocks the steps since they were read, and since they came.
    """

    missing: IntArray
    ages: LongArray


@loop
def take(count: int, slots: SlotArrays, clock: int, given: Given) -> tuple[int, int]:
    """As `SlotTable._take`, into the second row of `given.missing`.

    Returns:
        The newest step that reads one of the slots, and how many blocks are evicted, with their ages in `given.ages`;
        -1 and BROKEN if fewer slots are queued than have no pin, or a block without host copy stands among them.
    """
    last_read, num_evicted, head = 0, 0, slots.ends[HEAD]
    for index in range(count):
        while head < slots.ends[TAIL] and slots.stamp_of[slots.queued[head]] != slots.stamps[head]:
            head += 1
        if head == slots.ends[TAIL]:
            return -1, BROKEN
        slot = slots.queued[head]
        head += 1
        slots.stamp_of[slot] = NOT_QUEUED
        block = slots.owner[slot]
        if block != NO_OWNER:
            if not slots.host_valid[block]:
                return -1, BROKEN
            given.ages[0, num_evicted] = clock - slots.last_read[slot]
            given.ages[1, num_evicted] = clock - slots.held_since[slot]
            slots.lut[block], num_evicted = NOT_RESIDENT, num_evicted + 1
        last_read = max(last_read, slots.last_read[slot])
        given.missing[1, index] = slot
    slots.ends[HEAD] = head
    slots.counts[USED] -= num_evicted
    return min(last_read, clock - 1), num_evicted


@loop
def find_missing(blocks: IntArray, slots: SlotArrays, missing: IntArray, is_fresh: bool) -> int:
    """Which of the blocks have no slot, into the first row of `missing`.

    Args:
        blocks: int32 `[n]`, all different.
        slots: of the group.
        missing: takes them.
        is_fresh: they are to be written; otherwise their content is read.

    Returns:
        How many they are; NOT_DONE if a block has content and should not, or has none and should, or slots are too few.
    """
    num_missing = num_idle = 0
    for index in range(blocks.size):
        block = blocks[index]
        slot = slots.lut[block]
        if slots.host_valid[block] == is_fresh and (is_fresh or slot == NOT_RESIDENT):
            return NOT_DONE
        if slot == NOT_RESIDENT:
            missing[0, num_missing] = block
            num_missing += 1
        elif is_fresh:
            return NOT_DONE
        elif slots.pins[slot] == 0:
            num_idle += 1
    is_room = num_missing + num_idle <= slots.pins.size - 1 - slots.counts[PINNED]
    return num_missing if is_room else NOT_DONE


@loop
def settle(
    place: IntArray,
    position: IntArray,
    once: IntArray,
    table: TableArrays,
    slots: SlotArrays,
    clock: int,
    given: Given,
    is_fresh: bool,
) -> tuple[int, int, int]:
    """As `SlotTable.claim`, or `hold_fresh`, and `Entries.set_slots`.

    Args:
        place: int32 `[n]` of blocks, which may be given several times.
        position: int32 `[n]`.
        once: int32 `[m]` the same blocks, each once: in the order in which slots are given.
        table: of the group.
        slots: of the group.
        clock: number of the step.
        given: takes the blocks that had no slot.
        is_fresh: they are to be written; otherwise their content is copied from the host.

    Returns:
        How many had no slot; the newest step that reads one of the slots that they are given; how many were evicted.
        NOT_DONE or BROKEN as the first: see `find_missing` and `take`.
    """
    num_missing = find_missing(once, slots, given.missing, is_fresh)
    if num_missing < 0:
        return num_missing, 0, 0
    for index in range(once.size):
        slot = slots.lut[once[index]]
        if slot != NOT_RESIDENT and slots.pins[slot] == 0:
            slots.counts[PINNED] += 1
            slots.stamp_of[slot] = NOT_QUEUED
    last_read, num_evicted = take(num_missing, slots, clock, given)
    if num_evicted < 0:
        return BROKEN, 0, 0
    for index in range(num_missing):
        block, slot = given.missing[0, index], given.missing[1, index]
        slots.lut[block], slots.owner[slot], slots.held_since[slot], slots.pins[slot] = slot, block, clock, 0
    slots.counts[PINNED] += num_missing
    slots.counts[USED] += num_missing
    for index in range(place.size):
        slot = slots.lut[table.ids[place[index], position[index]]]
        slots.pins[slot] += 1
        table.slot[place[index], table.entry[place[index], position[index]]] = slot
    return num_missing, last_read, num_evicted
