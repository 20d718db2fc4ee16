"""How a resident set changes: the blocks a scheduled request holds from this step on."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.counters import Counters
from flashmemory_vllm.residency.demand import Demand, joined
from flashmemory_vllm.residency.fallback import DenseFallback
from flashmemory_vllm.residency.ranking import Frame, best, difference, merged, worst_to_best, worth_a_slot
from flashmemory_vllm.residency.requests import RequestState, ScheduledRequest
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import NOTHING, IntArray, Phase
from flashmemory_vllm.residency.worth import Worth


class Settler:
    """Settles one row at a time: pins what has slots, gives up what it no longer holds, demands what is missing."""

    def __init__(
        self,
        slots: SlotTable,
        counters: Counters,
        score_threshold: float,
        fallback: DenseFallback | None,
        worth: Worth,
    ) -> None:
        self._slots = slots
        self._counters = counters
        self._score_threshold = score_threshold
        self._fallback = fallback
        self._worth = worth

    def settle(self, row: ScheduledRequest, demand: Demand) -> None:
        """Bring the sets of a row up to date. A decode row that goes on in the same block has nothing to do.

        Raises:
            IntegrityError: a decode row writes more blocks than its budget has room for. One token, which is all that
                a decode row computes without drafts, always fits: see `BudgetPolicy.decode_budget`.
        """
        if row.phase is Phase.PREFILL:
            self._settle_prefill(row, demand)
        elif row.num_tokens_after > row.state.settled_until or row.state.offered is not None:
            self._settle_decode(row, demand)

    def give_back(self, state: RequestState, demand: Demand) -> None:
        """Leave a request that fell back the best blocks within its budget, as it was before this step.

        Args:
            state: a request that decodes, scheduled or not, not settled yet in this step.
            demand: takes what is given up.
        """
        num_blocks = int(state.sets[0].held[-1]) + 1
        num_tokens = num_blocks * state.policy.block_size
        recent_start = num_blocks - state.policy.recent_blocks(num_tokens)
        frame = Frame(min(state.policy.sink_blocks(num_tokens), recent_start), recent_start, num_blocks)
        for group, resident in enumerate(state.sets):
            scores = state.scores_of(group)
            wanted = worth_a_slot(frame.candidates(), scores, self._score_threshold)
            target = frame.with_best(wanted, scores, state.policy.decode_budget(num_tokens))
            waiting = resident.waiting[np.isin(resident.waiting, target)]
            held = difference(target, np.sort(waiting))
            dropped = difference(resident.held, held)
            demand.given_up[group].append(state.blocks.ids[dropped])
            resident.replace(held, scores, waiting, best(dropped, scores, waiting.size))
        state.table, state.settled_until = None, 0

    def _settle_prefill(self, row: ScheduledRequest, demand: Demand) -> None:
        """A dense request goes on holding all it has; another one holds what it writes."""
        is_dense = row.state.policy.keeps_all(row.state.prefill_len)
        for group, resident in enumerate(row.state.sets):
            holds_history = is_dense and resident.held.size == row.first_fresh
            first = 0 if holds_history else row.first_written
            self._change_set(row, group, np.arange(first, row.end, dtype=np.int32), demand, may_wait=False)
        demand.fresh.append(row.fresh)
        if is_dense:
            demand.dense_prefills.append(row)

    def _settle_decode(self, row: ScheduledRequest, demand: Demand) -> None:
        state = row.state
        budget = state.policy.decode_budget(row.num_tokens_after)
        frame, keeps_all = self._frame(row, budget), budget == row.end
        if self._fallback is not None and not keeps_all:
            if state.offered is not None:
                self._fallback.learn(state, frame)
            if state.falls_back:
                budget = row.end
                frame = self._frame(row, budget)
        if state.offered is None and state.kept_all and not keeps_all:
            self._counters.missing_selections += 1
        if state.offered is not None or not state.is_decoding:
            self._choose(row, frame, budget, demand)
        else:
            self._go_on(row, frame, budget, demand)
        if row.first_fresh < row.end:
            demand.fresh.append(row.fresh)
        state.table, state.kept_all, state.is_decoding = None, keeps_all, True
        if state.is_changing:
            demand.waiting.append(row)
            state.settled_until = 0
        else:
            state.settled_until = state.policy.same_budget_until(row.num_tokens_after)

    def _go_on(self, row: ScheduledRequest, frame: Frame, budget: int, demand: Demand) -> None:
        """The sets as they are, with the blocks begun now, and without the worst where there is no room for both."""
        state, ids = row.state, row.state.blocks.ids
        for group, resident in enumerate(state.sets):
            scores = state.scores_of(group)
            excess = resident.held.size + resident.waiting.size + row.end - row.first_fresh - budget
            # The set begins with the whole sink and ends with all recent blocks but the fresh ones.
            inner = slice(frame.sink_end, resident.held.size - (row.first_fresh - frame.recent_start))
            dropped = resident.grow(row.first_fresh, row.end, excess, inner, scores)
            if dropped.size:
                demand.given_up[group].append(ids[dropped])
            if resident.leaving.size:
                resident.fill_in(self._resident(row, group, resident.leaving), scores)

    def _choose(self, row: ScheduledRequest, frame: Frame, budget: int, demand: Demand) -> None:
        """The best blocks by the selection offered; without one, whatever has a slot."""
        state = row.state
        is_selected = state.offered is not None
        is_reselected = is_selected and state.scores is not None
        if is_selected:
            state.scores, state.offered = state.offered, None
            self._counters.selections += 1
            state.selection = self._counters.selections
        for group, resident in enumerate(state.sets):
            candidates, prefetched = frame.candidates(), resident.portions
            if is_selected:
                candidates = worth_a_slot(candidates, state.scores_of(group), self._score_threshold)
            else:
                candidates = self._resident(row, group, candidates)
            # What a prompt happens to hold is no set: nobody has chosen it.
            held = resident.held if state.is_decoding else NOTHING
            target = frame.with_best(candidates, self._worth.preferring(held, state.scores_of(group)), budget)
            # The first set is needed at once. Later ones have an old set to go on with meanwhile.
            joining = self._change_set(row, group, target, demand, may_wait=state.is_decoding and not state.at_once)
            if is_selected:
                self._counters.selection_candidates += frame.recent_start - frame.sink_end
                self._counters.selected_blocks += frame.num_chosen(target)
            if is_reselected and not state.falls_back:
                self._judge(frame, target, joining, prefetched)
        state.at_once = False

    def _judge(self, frame: Frame, target: IntArray, joining: IntArray, prefetched: list[IntArray]) -> None:
        """Count what the set before was good for, by the scores of the new selection.

        Args:
            frame: what is forced in the new set.
            target: positions of the new set.
            joining: those of them that the request did not hold.
            prefetched: positions that came into the set before while it was in force.
        """
        num_chosen = frame.num_chosen(target)
        # `bisect` is faster than `searchsorted` for one number
        num_missing = bisect_left(joining, frame.recent_start) - bisect_left(joining, frame.sink_end)
        self._counters.reselected_blocks += num_chosen
        self._counters.reselected_resident_blocks += num_chosen - num_missing
        if prefetched:
            judged = joined(prefetched)
            # The set ends with the newest block, so that the place of each lies within it
            is_chosen = target[target.searchsorted(judged)] == judged
            self._counters.judged_prefetches += judged.size
            self._counters.useful_prefetches += int(np.count_nonzero(is_chosen))

    def _frame(self, row: ScheduledRequest, budget: int) -> Frame:
        if budget == row.end:
            return Frame(0, 0, row.end)
        policy, after = row.state.policy, row.num_tokens_after
        recent_start = min(row.end - policy.recent_blocks(after), row.first_written)
        sink_end = min(policy.sink_blocks(after), recent_start)
        if sink_end + row.end - recent_start > budget:
            raise IntegrityError(
                f"request {row.state.req_id}: a decode step of {row.num_tokens} tokens is given, "
                f"which with {sink_end} sink blocks exceeds the budget of {budget} blocks; "
                f"allowed are {row.block_size} tokens"
            )
        return Frame(sink_end, recent_start, row.end)

    def _resident(self, row: ScheduledRequest, group: int, positions: IntArray) -> IntArray:
        return positions[self._slots.is_resident(group, row.state.blocks.ids[positions])]

    def _change_set(
        self, row: ScheduledRequest, group: int, target: IntArray, demand: Demand, *, may_wait: bool
    ) -> IntArray:
        """Replace the set that a request holds in a group.

        Args:
            row: the request in this step.
            group: layer group.
            target: positions of the new set.
            demand: takes what has no slot; the blocks written first in this step are not put in here.
            may_wait: whether missing blocks may be prefetched instead of recalled.

        Returns:
            int32 positions of the new set that the request did not hold.
        """
        state, ids = row.state, row.state.blocks.ids
        resident, scores = state.sets[group], state.scores_of(group)
        joining, dropping = difference(target, resident.held), difference(resident.held, target)
        has_slot = self._slots.is_resident(group, ids[joining])
        self._slots.pin(group, ids[joining[has_slot]])
        demand.given_up[group].append(ids[dropping])
        missing = joining[~has_slot & (joining < row.first_fresh)]
        waiting = leaving = NOTHING
        if may_wait:
            waiting, target = worst_to_best(missing, scores)[::-1], difference(target, missing)
            # Of what was read so far, the best blocks stay in the place of those that are not there yet. They are
            # not pinned, but the last to be evicted.
            filled_in = difference(self._resident(row, group, resident.leaving), target)
            leaving = best(merged(dropping, filled_in), scores, waiting.size)
        elif missing.size:
            demand.recalls[group].append(ids[missing])
        resident.replace(target, scores, waiting, leaving)
        return joining
