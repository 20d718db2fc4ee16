"""Compacted block tables: what a row reads from slots, what from the host, and what it does without."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashmemory_vllm.residency.books import Books
from flashmemory_vllm.residency.counters import Counters
from flashmemory_vllm.residency.requests import ScheduledRequest, Table
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import NOTHING, IntArray, Phase, Row


def row_of(row: ScheduledRequest, slots: SlotTable, books: Books, counters: Counters) -> Row:
    """What a row reads and writes in this step, once all blocks have their slots."""
    state = row.state
    if row.phase is Phase.PREFILL:
        table = _prefill_table(row, slots)
        counters.streamed_blocks += sum(blocks.size for blocks in table.streamed)
    else:
        if books.take_changed(state.place):
            state.table = None
        table = state.table = state.table or _decode_table(row, books)
        counters.decode_rows += 1
        counters.decode_resident_blocks += table.num_resident
        counters.decode_context_blocks += row.end * len(books.groups)
    return Row(
        req_id=state.req_id,
        phase=row.phase,
        num_computed_tokens=row.num_computed_tokens,
        num_tokens=row.num_tokens,
        slots=table.slots,
        positions=table.positions,
        evicted_tokens=table.evicted_tokens,
        streamed=table.streamed,
    )


def _decode_table(row: ScheduledRequest, books: Books) -> Table:
    """What the books say of a row; they go on being written."""
    place = row.state.place
    positions = [entries.positions_of(place).copy() for entries in books.groups]
    slots = [entries.slots_of(place).copy() for entries in books.groups]
    return _table(row, positions, slots, [NOTHING] * len(positions))


def _prefill_table(row: ScheduledRequest, slots: SlotTable) -> Table:
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
