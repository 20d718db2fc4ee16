"""What the rows of one plan give up and want slots for, collected before any slot is given out.

Slots are taken in the order of need, and only after every row has given up what it no longer holds: what one
request returns in a step, the scheduler may have promised to another in the same step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from flashmemory_vllm.residency.ranking import worst_to_best
from flashmemory_vllm.residency.requests import RequestState, ScheduledRequest
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import NO_SCORES, NOTHING, Copies, IntArray


@dataclass(frozen=True, slots=True)
class Granted:
    """The copies that bring the wanted blocks, one entry for each group that has any."""

    fresh: tuple[Copies, ...]
    recalls: tuple[Copies, ...]
    prefetches: tuple[Copies, ...]


class Demand:
    """Wishes of all rows of a plan.

    Attributes:
        given_up: per group, blocks that a row does without from now on; a shared one once for each row.
        fresh: blocks to be written, in every group.
        recalls: per group, blocks to be read in this step.
        waiting: rows whose sets wait for blocks, of which each step brings some.
        dense_prefills: rows that would like to hold all their history.
    """

    def __init__(self, num_groups: int, max_prefetches: int) -> None:
        self._max_prefetches = max_prefetches
        self.given_up: list[list[IntArray]] = [[] for _ in range(num_groups)]
        self.fresh: list[IntArray] = []
        self.recalls: list[list[IntArray]] = [[] for _ in range(num_groups)]
        self.waiting: list[ScheduledRequest] = []
        self.dense_prefills: list[ScheduledRequest] = []

    def grant(self, slots: SlotTable, known: Iterable[RequestState]) -> Granted:
        """Take back what is given up, then give slots to every wish, but for prefetches above the limit of a step.

        A dense prefill row gets its history only where that leaves room for all that waits; it can do without.

        Args:
            slots: where slots come from.
            known: all known requests, scheduled or not.

        Raises:
            IntegrityError: there are not enough slots: more was admitted than the ledger allows.
        """
        groups = range(len(self.recalls))
        for group in groups:
            if self.given_up[group]:
                slots.unpin(group, joined(self.given_up[group]))
            for row in self.waiting:
                _keep_leaving(slots, row.state, group)
        to_write = joined(self.fresh)
        fresh = [slots.hold_fresh(group, to_write) for group in groups] if to_write.size else []
        recalls = [[slots.hold(group, blocks) for blocks in self.recalls[group]] for group in groups]
        if self.dense_prefills:
            for group in groups:
                promised = sum(state.sets[group].waiting.size for state in known)
                recalls[group] += [self._hold_history(slots, row, group, promised) for row in self.dense_prefills]
        self.waiting.sort(key=attrgetter("state.falls_back", "state.selection"))
        prefetches = [self._prefetch(slots, group) for group in groups]
        for row in self.waiting:
            _fill_in(slots, row.state)
        return Granted(tuple(fresh), _merged(recalls), _merged(prefetches))

    def _hold_history(self, slots: SlotTable, row: ScheduledRequest, group: int, promised: int) -> Copies:
        resident, history = row.state.sets[group], row.history
        if resident.held.size == row.end or slots.demand(group, history) > slots.spare(group) - promised:
            return Copies(group, NOTHING, NOTHING)
        resident.replace(np.arange(row.end, dtype=np.int32), NO_SCORES, NOTHING, NOTHING)
        return slots.hold(group, history)

    def _prefetch(self, slots: SlotTable, group: int) -> list[Copies]:
        """The oldest selections first, each with its best blocks first; a block that has a slot costs nothing.

        Requests that fall back come last: what they wait for is most of their blocks.
        """
        copies: list[Copies] = []
        left = self._max_prefetches
        for row in self.waiting:
            resident = row.state.sets[group]
            portion = resident.waiting[:left]
            if portion.size:
                copies.append(slots.hold(group, row.state.blocks.ids[portion]))
                resident.join(portion.size, row.state.scores_of(group))
                left -= copies[-1].blocks.size
        return copies


def _keep_leaving(slots: SlotTable, state: RequestState, group: int) -> None:
    """Make blocks that fill in the last to be evicted, the worst of them first."""
    leaving = worst_to_best(state.sets[group].leaving, state.scores_of(group))
    slots.touch(group, state.blocks.ids[leaving])


def _fill_in(slots: SlotTable, state: RequestState) -> None:
    """Of the leaving blocks that kept their slots the best stand in for what waits for a later step."""
    for group, resident in enumerate(state.sets):
        has_slot = slots.is_resident(group, state.blocks.ids[resident.leaving])
        resident.fill_in(resident.leaving[has_slot], state.scores_of(group))


def joined(arrays: Sequence[IntArray]) -> IntArray:
    """All the arrays as one."""
    return np.concatenate(arrays) if arrays else NOTHING


def _merged(copies_by_group: list[list[Copies]]) -> tuple[Copies, ...]:
    merged = (
        Copies(
            group,
            joined([one.blocks for one in copies]),
            joined([one.slots for one in copies]),
            min((one.rested for one in copies), default=0),
        )
        for group, copies in enumerate(copies_by_group)
    )
    return tuple(copies for copies in merged if copies.blocks.size)
