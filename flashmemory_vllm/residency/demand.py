"""What the rows of one plan want slots for, collected before any slot is given out.

Slots are taken in the order of need, and only after every row has given up what it no longer holds: what one
request returns in a step, the scheduler may have promised to another in the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashmemory_vllm.residency.requests import ScheduledRequest
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import NOTHING, Copies, IntArray


@dataclass(frozen=True, slots=True)
class Granted:
    """The copies that bring the wanted blocks, one entry for each group that has any."""

    fresh: tuple[Copies, ...]
    recalls: tuple[Copies, ...]
    prefetches: tuple[Copies, ...]


class Demand:
    """Wishes of all rows of a plan.

    Attributes:
        fresh: blocks to be written, in every group.
        recalls: per group, blocks to be read in this step.
        prefetches: per group, blocks to be read from the next step on.
        dense_prefills: rows that would like to hold all their history.
    """

    def __init__(self, num_groups: int) -> None:
        self.fresh: list[IntArray] = []
        self.recalls: list[list[IntArray]] = [[] for _ in range(num_groups)]
        self.prefetches: list[list[IntArray]] = [[] for _ in range(num_groups)]
        self.dense_prefills: list[ScheduledRequest] = []

    def grant(self, slots: SlotTable) -> Granted:
        """Give every wish its slots.

        A dense prefill row gets its history only where that leaves room for the prefetches; it can do
        without.

        Raises:
            IntegrityError: there are not enough slots: more was admitted than the ledger allows.
        """
        groups = range(len(self.recalls))
        to_write = joined(self.fresh)
        fresh = [slots.hold_fresh(group, to_write) for group in groups] if to_write.size else []
        recalls = [[slots.hold(group, blocks) for blocks in self.recalls[group]] for group in groups]
        for row in self.dense_prefills:
            for group in groups:
                recalls[group].extend(self._hold_history(slots, row, group))
        prefetches = [[slots.prefetch(group, blocks) for blocks in self.prefetches[group]] for group in groups]
        return Granted(tuple(fresh), _merged(recalls), _merged(prefetches))

    def _hold_history(self, slots: SlotTable, row: ScheduledRequest, group: int) -> list[Copies]:
        if row.state.held[group].size == row.end:
            return []
        promised = sum(blocks.size for blocks in self.prefetches[group])
        if slots.demand(group, row.history) > slots.spare(group) - promised:
            return []
        row.state.held[group] = np.arange(row.end, dtype=np.int32)
        return [slots.hold(group, row.history)]


def joined(arrays: Sequence[IntArray]) -> IntArray:
    """All the arrays as one."""
    return np.concatenate(arrays) if arrays else NOTHING


def _merged(copies_by_group: list[list[Copies]]) -> tuple[Copies, ...]:
    merged = (
        Copies(group, joined([one.blocks for one in copies]), joined([one.slots for one in copies]))
        for group, copies in enumerate(copies_by_group)
    )
    return tuple(copies for copies in merged if copies.blocks.size)
