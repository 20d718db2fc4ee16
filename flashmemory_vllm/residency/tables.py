"""Compacted block tables: what a row reads from slots, what from the host, and what it does without."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashmemory_vllm.residency.books import Books
from flashmemory_vllm.residency.requests import ScheduledRequest
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import NOTHING, IntArray, Row


def decode_row(row: ScheduledRequest, books: Books) -> Row:
    """What the books say that a row reads; they go on being written, so this is a copy."""
    place = row.state.place
    positions = [entries.positions_of(place).copy() for entries in books.groups]
    slots = [entries.slots_of(place).copy() for entries in books.groups]
    return _row(row, positions, slots, [NOTHING] * len(positions))


def prefill_row(row: ScheduledRequest, slots: SlotTable) -> Row:
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
    return _row(row, positions, slots_by_group, streamed)


def _row(
    row: ScheduledRequest,
    positions: Sequence[IntArray],
    slots_by_group: Sequence[IntArray],
    streamed: Sequence[IntArray],
) -> Row:
    for array in (*positions, *slots_by_group, *streamed):
        array.flags.writeable = False
    return Row(
        req_id=row.state.req_id,
        phase=row.phase,
        num_computed_tokens=row.num_computed_tokens,
        num_tokens=row.num_tokens,
        slots=tuple(slots_by_group),
        positions=tuple(positions),
        evicted_tokens=tuple(row.block_size * (row.end - chosen.size) for chosen in positions),
        streamed=tuple(streamed),
    )
