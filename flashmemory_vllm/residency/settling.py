"""How a resident set changes: the blocks a scheduled request holds from this step on."""

from __future__ import annotations

import numpy as np

from flashmemory_vllm.errors import UnsupportedError
from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.residency.demand import Demand
from flashmemory_vllm.residency.ranking import Frame, best, difference, worst_to_best, worth_a_slot
from flashmemory_vllm.residency.requests import ScheduledRequest
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import NOTHING, Counters, IntArray, Phase


class Settler:
    """Settles one row at a time: pins what has slots, unpins what it gives up, demands what is missing."""

    def __init__(self, policy: BudgetPolicy, slots: SlotTable, counters: Counters, score_threshold: float) -> None:
        self._policy = policy
        self._slots = slots
        self._counters = counters
        self._score_threshold = score_threshold

    def settle(self, row: ScheduledRequest, demand: Demand) -> None:
        """Bring the sets of a row up to date. A decode row that goes on in the same block has nothing to do.

        Raises:
            UnsupportedError: a decode row writes more blocks than its budget has room for.
        """
        if row.phase is Phase.PREFILL:
            self._settle_prefill(row, demand)
        else:
            self._settle_decode(row, demand)

    def _settle_prefill(self, row: ScheduledRequest, demand: Demand) -> None:
        """A dense request goes on holding all it has; another one holds what it writes."""
        is_dense = self._policy.keeps_all(row.state.prefill_len)
        for group, held in enumerate(row.state.held):
            holds_history = is_dense and held.size == row.first_fresh
            first = 0 if holds_history else row.first_written
            self._change_set(row, group, np.arange(first, row.end, dtype=np.int32), None, demand)
        demand.fresh.append(row.fresh)
        if is_dense:
            demand.dense_prefills.append(row)

    def _settle_decode(self, row: ScheduledRequest, demand: Demand) -> None:
        state = row.state
        budget = self._policy.decode_budget(row.num_tokens_after)
        table = state.table
        if table and table.num_blocks == row.end and state.budget == budget and state.offered is None:
            return
        frame = self._frame(row, budget)
        keeps_all = budget == row.end
        is_selected = state.offered is not None
        if is_selected:
            state.scores, state.offered = state.offered, None
            self._counters.selections += 1
        elif state.kept_all and not keeps_all:
            self._counters.missing_selections += 1
        for group in range(len(state.held)):
            if keeps_all:
                candidates = frame.candidates()
            elif is_selected:
                candidates = worth_a_slot(frame.candidates(), state.scores_of(group), self._score_threshold)
            else:
                candidates = self._at_hand(row, frame, group)
            target = frame.with_best(candidates, state.scores_of(group), budget)
            # The first set is needed at once. Later ones have an old set to go on with meanwhile.
            may_wait = frame if is_selected and state.is_decoding else None
            self._change_set(row, group, target, may_wait, demand)
        if row.fresh.size:
            demand.fresh.append(row.fresh)
        state.table, state.budget, state.kept_all, state.is_decoding = None, budget, keeps_all, True

    def _frame(self, row: ScheduledRequest, budget: int) -> Frame:
        recent_start = min(row.end - self._policy.recent_blocks(row.num_tokens_after), row.first_written)
        sink_end = min(self._policy.sink_blocks(row.num_tokens_after), recent_start)
        if sink_end + row.end - recent_start > budget:
            raise UnsupportedError(
                f"request {row.state.req_id}: a decode step of {row.num_tokens} tokens is given, "
                f"which with {sink_end} sink blocks exceeds the budget of {budget} blocks; "
                f"allowed are {row.block_size} tokens"
            )
        return Frame(sink_end, recent_start, row.end)

    def _at_hand(self, row: ScheduledRequest, frame: Frame, group: int) -> IntArray:
        """Blocks to choose from without a new selection: the set so far, or at first whatever has a slot."""
        if row.state.is_decoding:
            return frame.inside(row.state.held[group])
        candidates = frame.candidates()
        return candidates[self._slots.readable(group, row.state.blocks.ids[candidates])]

    def _change_set(
        self, row: ScheduledRequest, group: int, target: IntArray, may_wait: Frame | None, demand: Demand
    ) -> None:
        """Replace the set that a request holds in a group.

        Args:
            row: the request in this step.
            group: layer group.
            target: positions of the new set.
            may_wait: its inner blocks may be prefetched; None to recall whatever is missing.
            demand: takes what has no slot; the blocks written first in this step are not put in here.
        """
        state, ids = row.state, row.state.blocks.ids
        joining, dropping = difference(target, state.held[group]), difference(state.held[group], target)
        is_readable = self._slots.readable(group, ids[joining])
        self._slots.pin(group, ids[joining[is_readable]])
        self._slots.unpin(group, ids[dropping])
        missing = joining[~is_readable & (joining < row.first_fresh)]
        landing = leaving = NOTHING
        if may_wait is not None and missing.size:
            landing = may_wait.inside(missing)
            # Of what is dropped, the best blocks stay readable in the place of those that are not there yet.
            # They are not pinned, but the last to be evicted, the worst of them first.
            leaving = best(dropping, state.scores_of(group), landing.size)
            self._slots.touch(group, ids[worst_to_best(leaving, state.scores_of(group))])
            demand.prefetches[group].append(ids[landing])
            missing = difference(missing, landing)
        if missing.size:
            demand.recalls[group].append(ids[missing])
        state.held[group], state.landing[group], state.leaving[group] = target, landing, leaving
