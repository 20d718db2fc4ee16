"""The arrays of a layer group's slots, and what stands in them where there is nobody."""

from __future__ import annotations

from typing import NamedTuple

from flashmemory_vllm.residency.types import BoolArray, IntArray, LongArray

NOT_RESIDENT = -1
NO_OWNER = -1
NULL_BLOCK = 0
NULL_SLOT = 0


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
