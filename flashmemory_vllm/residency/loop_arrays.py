"""The arrays that loops change, by layer group; apart from the loops, which only who uses them has to import."""

from __future__ import annotations

from typing import NamedTuple

from flashmemory_vllm.residency.types import BoolArray, IntArray, LongArray

NOT_RESIDENT = -1
NO_OWNER = -1
NULL_BLOCK = 0
NULL_SLOT = 0


class TableArrays(NamedTuple):
    """One layer group's arrays of `Entries` and `Books`, by their names there, but for the count of entries."""

    ids: IntArray
    epoch: IntArray
    is_wide: BoolArray
    entry: IntArray
    position: IntArray
    slot: IntArray
    num_entries: IntArray
    sink: IntArray
    recent: IntArray
    is_extra: BoolArray


class SlotArrays(NamedTuple):
    """One layer group's arrays of `SlotTable` and `IdleQueue`, by their names there."""

    lut: IntArray
    host_valid: BoolArray
    pins: IntArray
    last_read: LongArray
    owner: IntArray
    held_since: LongArray
    counts: LongArray
    queued: IntArray
    stamps: LongArray
    stamp_of: LongArray
    ends: LongArray
