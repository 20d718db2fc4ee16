"""Compacted block tables: what a row reads from slots, what from the host, and what it does without."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashmemory_vllm.residency.ranking import difference
from flashmemory_vllm.residency.requests import ScheduledRequest, Table
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import NOTHING, IntArray


def decode_table(row: ScheduledRequest, slots: SlotTable) -> Table:
    """The resident set, with leaving blocks in place of those whose copies have yet to land."""
    state = row.state
    positions = []
    for group, held in enumerate(state.held):
        if state.landing[group].size:
            leaving = state.leaving[group]
            # The room they take may have been needed meanwhile.
            leaving = leaving[slots.readable(group, state.blocks.ids[leaving])]
            positions.append(np.sort(np.concatenate((difference(held, state.landing[group]), leaving))))
        else:
            positions.append(held)
    return _table(row, slots, positions, [NOTHING] * len(positions))


def prefill_table(row: ScheduledRequest, slots: SlotTable) -> Table:
    """All history where it is resident; otherwise the blocks written, with history streamed from the host.

    Full blocks that another row writes in this very step are history that the host does not have yet. They
    have slots in any case, and attention runs after the writes, so they are read there.
    """
    positions, streamed = [], []
    for group, held in enumerate(row.state.held):
        if held.size == row.end:
            positions.append(held)
            streamed.append(NOTHING)
            continue
        history = row.history
        is_readable = slots.readable(group, history)
        in_table = np.ones(row.end, np.bool_)
        if is_readable.all():
            slots.touch(group, history)
        else:
            in_table[: row.first_written] = is_readable & ~slots.host_valid[history]
        positions.append(np.flatnonzero(in_table).astype(np.int32))
        streamed.append(history[~in_table[: row.first_written]])
        slots.require_host_copy(streamed[-1])
    return _table(row, slots, positions, streamed)


def _table(
    row: ScheduledRequest, slots: SlotTable, positions: Sequence[IntArray], streamed: Sequence[IntArray]
) -> Table:
    ids = row.state.blocks.ids
    slots_by_group = tuple(slots.lut[group, ids[chosen]] for group, chosen in enumerate(positions))
    for array in (*positions, *slots_by_group, *streamed):
        array.flags.writeable = False
    return Table(
        slots=slots_by_group,
        positions=tuple(positions),
        evicted_tokens=tuple(row.block_size * (row.end - chosen.size) for chosen in positions),
        streamed=tuple(streamed),
        num_blocks=row.end,
    )
