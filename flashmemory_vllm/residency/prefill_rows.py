"""What prefill rows hold: the blocks that they write, and dense ones all of their history if there is room."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import starmap

import numpy as np

from flashmemory_vllm.residency.requests import ScheduledRequest
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import NOTHING, Copies, joined


class PrefillRows:
    """Settles the prefill rows of a step, then takes slots for them.

    Slots are taken only after every row has given up what it no longer holds: what one request returns in a step, the
    scheduler may have promised to another in the same step.
    """

    def __init__(self, slots: SlotTable, num_groups: int) -> None:
        self._slots = slots
        self._groups = range(num_groups)

    def settle(self, rows: Sequence[ScheduledRequest]) -> None:
        """Give up what rows do not hold any more, and note what they hold from now on."""
        for row in rows:
            state = row.state
            for group, held in enumerate(state.held):
                holds_history = _is_dense(row) and held.size == row.first_fresh
                first = 0 if holds_history else row.first_written
                self._slots.unpin(group, state.blocks.ids[held[held < first]])
                state.held[group] = np.arange(first, row.end, dtype=np.int32)

    def grant(self, rows: Sequence[ScheduledRequest]) -> tuple[list[Copies], list[Copies]]:
        """Give slots to what rows write, and to the history of dense ones where there is room; they can do without.

        Returns:
            Blocks that are begun, for each group with any, and history that is to be copied from the host.

        Raises:
            IntegrityError: there are not enough slots: more was admitted than the ledger allows.
        """
        to_write = joined([row.fresh for row in rows])
        fresh = [self._slots.hold_fresh(group, to_write) for group in self._groups] if to_write.size else []
        dense = [(group, row) for group in self._groups for row in rows if _is_dense(row)]
        history = [copies for copies in starmap(self._hold_history, dense) if copies.blocks.size]
        return fresh, history

    def _hold_history(self, group: int, row: ScheduledRequest) -> Copies:
        held, history = row.state.held, row.history
        if held[group].size == row.end or self._slots.demand(group, history) > self._slots.spare(group):
            return Copies(group, NOTHING, NOTHING)
        held[group] = np.arange(row.end, dtype=np.int32)
        return self._slots.hold(group, history)


def _is_dense(row: ScheduledRequest) -> bool:
    return row.state.policy.keeps_all(row.state.prefill_len)
