"""What decode rows are asked for and what is counted of their selections, described one row after the other.

The planner does this for all rows at once. `RowByRow` watches a planner step by step and asserts that it comes to the
same.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from flashmemory_vllm.residency.asked import AskedRow
from flashmemory_vllm.residency.asking import farthest
from flashmemory_vllm.residency.budget import cdiv
from flashmemory_vllm.residency.entries import NO_ENTRY
from flashmemory_vllm.residency.lists import COMES, GOES, HEADER, WORTH, Chosen
from flashmemory_vllm.residency.plan import StepPlan
from flashmemory_vllm.residency.planner import StepPlanner
from flashmemory_vllm.residency.requests import RequestState, ScheduledRequest
from flashmemory_vllm.residency.types import IntArray, StepInput

COUNTED = (
    "selections", "selection_candidates", "selected_blocks", "reselected_blocks", "reselected_resident_blocks",
    "judged_prefetches", "useful_prefetches", "decode_rows", "decode_resident_blocks", "decode_context_blocks",
)  # fmt: skip


@dataclass(slots=True, eq=False)
class Watched:
    """What is known of a request.

    Attributes:
        state: the planner's, by which it is known again.
        phase: it is due with so many tokens, and whole cycles before and after; None before it was asked for.
        opening: steps to come that end with a selection of their own.
        lacks_chosen: its last list left out blocks that were chosen.
        is_selected: a selection was made.
        came: group and positions of what came since then.
    """

    state: RequestState
    phase: int | None = None
    opening: int = 0
    lacks_chosen: bool = False
    is_selected: bool = False
    came: list[tuple[int, IntArray]] = field(default_factory=list)


class RowByRow:
    """A description of the rows that a planner asks for.

    Args:
        planner: it is watched from now on.
        tau: as it was given to the planner, like `opening_steps` and `max_fetches`.
        opening_steps: see there.
        max_fetches: see there.
    """

    def __init__(self, planner: StepPlanner, tau: int, opening_steps: int, max_fetches: int) -> None:
        self._planner, self._tau, self._opening, self._max_fetches = planner, tau, opening_steps, max_fetches
        self._watched: dict[str, Watched] = {}
        self._counted: Counter[str] = Counter()
        self._apply = planner._decode_rows._apply
        planner._decode_rows._apply = self._applied  # type: ignore[method-assign]

    def check(self, step_input: StepInput, plan: StepPlan) -> None:
        """Assert that a plan, just made, asks for what it should, and has counted what it should."""
        rows = []
        for req_id, num_tokens in step_input.num_scheduled_tokens.items():
            state = self._of(req_id).state
            rows.append(ScheduledRequest(state, state.num_tokens - num_tokens, num_tokens, state.policy.block_size))
        asked = [one for one in map(self._ask, rows) if one is not None]
        num_fetching = sum(one.cap > 0 and not one.at_once for one in asked)
        share = max(1, self._max_fetches // max(1, num_fetching))
        assert [*plan.asked] == [one._replace(cap=share) if one.cap and not one.at_once else one for one in asked]
        for row in (row for row in rows if row.num_computed_tokens >= row.state.prefill_len):
            self._counted["decode_rows"] += 1
            for group, positions in enumerate(plan.rows[row.state.req_id].positions):
                self._counted["decode_resident_blocks"] += positions.size
                self._counted["decode_context_blocks"] += row.end
                evicted = plan.rows.batch([row.state.req_id]).evicted_tokens[0, group]
                assert evicted == row.block_size * (row.end - positions.size)
        found = {name: getattr(self._planner.counters, name) for name in COUNTED}
        assert found == {name: self._counted[name] for name in COUNTED}

    def _of(self, req_id: str) -> Watched:
        state = self._planner.requests.get(req_id)
        assert state is not None
        watched = self._watched.get(req_id)
        if watched is None or watched.state is not state:
            watched = self._watched[req_id] = Watched(state)
        return watched

    def _ask(self, row: ScheduledRequest) -> AskedRow | None:
        watched, after = self._of(row.state.req_id), row.num_tokens_after
        if watched.phase is None:
            if after < row.state.prefill_len or row.state.policy.keeps_all(after + 1):
                return None
            others = [one for one in self._planner.requests if self._of(one.req_id).phase is not None]
            taken = [(self._of(one.req_id).phase or 0) - one.num_tokens for one in others]
            watched.phase = (after + farthest(taken, self._tau)) % self._tau
            watched.opening = self._opening
            return self._asked(row, after + 1, is_new=True)
        if watched.opening:
            watched.opening -= 1
            return self._asked(row, after, at_once=True)
        is_due, begins = after % self._tau == watched.phase, row.first_fresh < row.end
        if not (is_due or begins or watched.lacks_chosen):
            return None
        fetches, watched.lacks_chosen = is_due or watched.lacks_chosen, False
        return self._asked(row, after, is_scored=is_due, fetches=fetches)

    def _asked(
        self,
        row: ScheduledRequest,
        num_tokens: int,
        *,
        is_new: bool = False,
        at_once: bool = False,
        is_scored: bool = True,
        fetches: bool = True,
    ) -> AskedRow:
        """What is asked for a row that has so many tokens."""
        state, policy = row.state, row.state.policy
        end = cdiv(num_tokens, row.block_size)
        first_recent = max(0, end - policy.recent_blocks(num_tokens))
        sink_end = min(policy.sink_blocks(num_tokens), first_recent)
        return AskedRow(
            state.req_id, state.place, int(self._planner._books.epoch[state.place]), row.num_tokens_after,
            state.prompt_len, row.num_tokens_after // row.block_size, sink_end, first_recent, end,
            want=policy.decode_budget(num_tokens) - sink_end - (end - first_recent), cap=end * fetches,
            is_new=is_new, is_scored=is_scored, at_once=at_once or is_new,
        )  # fmt: skip

    def _applied(self, chosen: Chosen) -> list[str]:
        """A list comes into force: count row by row what the planner counts."""
        books = self._planner._books
        is_mine = [one.epoch == books.epoch[one.place] for one in chosen.asked]
        selected = self._apply(chosen)
        longest = (chosen.rows.shape[2] - HEADER) // 2
        expected = []
        for one, of_row, mine, is_selected in zip(chosen.asked, chosen.rows, is_mine, chosen.is_selected, strict=True):
            if not mine:
                continue
            watched = self._of(one.req_id)
            if is_selected:
                self._note_selection(watched, one, of_row)
            if one.is_new:
                continue
            if is_selected:
                expected.append(one.req_id)
                self._judge(watched)
            come = [(group, line[HEADER : HEADER + line[COMES]]) for group, line in enumerate(of_row)]
            watched.came += [(group, positions.copy()) for group, positions in come]
            if one.cap and not chosen.at_once:
                comes, goes = of_row[:, COMES], of_row[:, GOES]
                watched.lacks_chosen = bool(((comes >= min(one.cap, longest)) | (goes >= longest)).any())
        assert selected == expected
        return selected

    def _note_selection(self, watched: Watched, asked: AskedRow, of_row: IntArray) -> None:
        counted = self._counted
        counted["selections"] += 1
        if not watched.state.falls_back:
            num_chosen = int(np.minimum(of_row[:, WORTH], asked.want).sum())
            counted["selection_candidates"] += len(of_row) * (asked.first_recent - asked.sink_end)
            counted["selected_blocks"] += num_chosen
            if watched.is_selected:
                counted["reselected_blocks"] += num_chosen
                counted["reselected_resident_blocks"] += num_chosen - int(of_row[:, COMES].sum())
        watched.is_selected = True

    def _judge(self, watched: Watched) -> None:
        for group, came in watched.came if not watched.state.falls_back else ():
            entries, place = self._planner._books.groups[group], watched.state.place
            is_chosen = (entries.entry[place, came] != NO_ENTRY) & ~entries.is_extra[place, came]
            self._counted["judged_prefetches"] += came.size
            self._counted["useful_prefetches"] += int(np.count_nonzero(is_chosen))
        watched.came = []
