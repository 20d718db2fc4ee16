"""Compacted block tables: what a row reads from slots, what from the host, and what it does without."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashmemory_vllm.residency.ranking import merged
from flashmemory_vllm.residency.requests import ScheduledRequest, Table
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import NOTHING, IntArray


def decode_table(row: ScheduledRequest, slots: SlotTable) -> Table:
    """The resident set, with leaving blocks in place of those that are not there yet."""
    ids = row.state.blocks.ids
    positions, slots_by_group = [], []
    for group, resident in enumerate(row.state.sets):
        if resident.is_changing:
            # The room of leaving blocks may have been needed meanwhile.
            leaving = resident.leaving[slots.is_resident(group, ids[resident.leaving])]
            positions.append(merged(resident.held, leaving))
            slots_by_group.append(slots.lut[group, ids[positions[-1]]])
        else:
            unknown = resident.held[resident.slots.size :]
            if unknown.size:
                resident.slots = np.concatenate((resident.slots, slots.lut[group, ids[unknown]]))
            positions.append(resident.held)
            slots_by_group.append(resident.slots)
    return _table(row, positions, slots_by_group, [NOTHING] * len(positions))


def prefill_table(row: ScheduledRequest, slots: SlotTable) -> Table:
    """All history where it is resident; otherwise the blocks written, with history streamed from the host.

    Full blocks that another row writes in this very step are history that the host does not have yet. They
    have slots in any case, and attention runs after the writes, so they are read there.
    """
    positions, streamed = [], []
    for group, resident in enumerate(row.state.sets):
        if resident.held.size == row.end:
            positions.append(resident.held)
            streamed.append(NOTHING)
            continue
        history = row.history
        is_resident = slots.is_resident(group, history)
        in_table = np.ones(row.end, np.bool_)
        if is_resident.all():
            slots.touch(group, history)
        else:
            in_table[: row.first_written] = is_resident & ~slots.host_valid[history]
        positions.append(np.flatnonzero(in_table).astype(np.int32))
        streamed.append(history[~in_table[: row.first_written]])
        slots.require_host_copy(streamed[-1])
    slots_by_group = [slots.lut[group, row.state.blocks.ids[chosen]] for group, chosen in enumerate(positions)]
    return _table(row, positions, slots_by_group, streamed)


def _table(
    row: ScheduledRequest,
    positions: Sequence[IntArray],
    slots_by_group: Sequence[IntArray],
    streamed: Sequence[IntArray],
) -> Table:
    evicted, num_resident = [], 0
    for array in (*positions, *slots_by_group, *streamed):
        array.flags.writeable = False
    for chosen in positions:
        evicted.append(row.block_size * (row.end - chosen.size))
        num_resident += chosen.size
    return Table(tuple(slots_by_group), tuple(positions), tuple(evicted), tuple(streamed), num_resident)
