"""What loops change of the tables; of the slots that is `SlotArrays`. Apart from the loops, for more than one file."""

from __future__ import annotations

from typing import NamedTuple

from flashmemory_vllm.residency.types import BoolArray, IntArray


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
