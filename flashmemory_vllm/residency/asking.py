"""Which decode rows are chosen for at the end of a step, and what is asked for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from flashmemory_vllm.residency.asked import Ask, Asked
from flashmemory_vllm.residency.books import Books
from flashmemory_vllm.residency.registry import RequestRegistry
from flashmemory_vllm.residency.requests import ScheduledRequest, ScheduledRows
from flashmemory_vllm.residency.types import BoolArray, IntArray

NOBODY = NOT_ASKED = -1


class Asking:
    """Finds the rows to choose for: at their first sparse step, then every `tau` tokens, and when they begin a block.

    The second time comes earlier, at the step of the cycle that is farthest from those of the other requests, so that
    requests which start together come due one by one. Between the two, each of a request's first decode steps may end
    with a selection that is in force in the next step. A row that only grows, or whose last list left out what was
    chosen, is chosen for by what is known of its blocks.

    Args:
        tau: tokens between two selections of a request.
        opening_steps: first decode steps of a request that each end with a selection of their own.
        max_fetches: most blocks that come into the sets of a step's rows in a group, but for those in force at once.
        known: all known requests, live.
        books: tenants and blocks of each place, live.

    Attributes:
        lacks_chosen: bool `[P]` places whose last list left out blocks that were chosen; whoever brings lists into
            force says so.
    """

    def __init__(
        self,
        tau: int,
        opening_steps: int,
        max_fetches: int,
        known: RequestRegistry,
        books: Books,
    ) -> None:
        self._tau = tau
        self._opening_steps = opening_steps
        self._max_fetches = max_fetches
        self._known = known
        self._books = books
        num_places = books.epoch.size
        self.lacks_chosen: BoolArray = np.zeros(num_places, np.bool_)
        # By place. What stands there is of this tenant; all else is of no meaning for another one
        self._tenant: IntArray = np.full(num_places, NOBODY, np.int32)
        # It is due with so many tokens, and with a whole number of cycles more or fewer; negative: never asked for
        self._phase: IntArray = np.zeros(num_places, np.int32)
        # While it was never asked for: up to so many tokens there is nothing to ask
        self._until: IntArray = np.zeros(num_places, np.int32)
        # Decode steps to come that each end with a selection of their own
        self._opening: IntArray = np.zeros(num_places, np.int32)
        self._prompt_len: IntArray = np.zeros(num_places, np.int32)
        # From `Ask.SINK_END` to `Ask.WANT`, for as many blocks as the request has
        self._frame: IntArray = np.zeros((num_places, Ask.CAP - Ask.SINK_END), np.int32)
        self._names = np.full(num_places, "", object)

    def asked(self, rows: ScheduledRows) -> Asked:
        """The rows of a step to choose for. Counts the step for each: call it once a step."""
        quick = self._asked_quickly(rows)
        return self._asked(rows) if quick is None else quick

    def _asked_quickly(self, rows: ScheduledRows) -> Asked | None:  # noqa: ARG002
        """The same where there is a quicker way for such rows: see `QuickAsking`. None: nothing is changed."""
        return None

    def _asked(self, rows: ScheduledRows) -> Asked:
        place, after = rows.place, rows.num_tokens_after
        is_new = self._first_time(rows)
        is_known = (self._phase[place] >= 0) & ~is_new
        begins = is_known & (rows.first_fresh < rows.end)
        if begins.any():
            self._set_frame(place[begins], after[begins])
        is_opening = is_known & (self._opening[place] > 0)
        self._opening[place[is_opening]] -= 1
        goes_on = is_known & ~is_opening
        is_due = goes_on & (after % self._tau == self._phase[place])
        fetches = is_due | (goes_on & self.lacks_chosen[place])
        at = np.flatnonzero(is_new | is_opening | fetches | begins)
        self.lacks_chosen[place[at]] &= is_opening[at]
        place, at_once = place[at], (is_new | is_opening)[at]
        fields = np.empty((at.size, len(Ask)), np.int32)
        fields[:, Ask.PLACE], fields[:, Ask.EPOCH] = place, self._tenant[place]
        fields[:, Ask.NUM_TOKENS], fields[:, Ask.PROMPT_LEN] = after[at], self._prompt_len[place]
        fields[:, Ask.NUM_FULL] = rows.num_full[at]
        fields[:, Ask.SINK_END : Ask.CAP] = self._frame[place]
        fields[:, Ask.CAP] = np.where(at_once, fields[:, Ask.END], self._share(fetches[at]))
        fields[:, Ask.IS_NEW], fields[:, Ask.AT_ONCE] = is_new[at], at_once
        fields[:, Ask.IS_SCORED] = at_once | is_due[at]
        return Asked(tuple(self._names[place].tolist()), fields, self._books.ids)

    def _share(self, fetches: BoolArray) -> IntArray:
        """How many blocks may come with the list of each row that is not in force at once; int32 `[n]`."""
        num_fetching = int(np.count_nonzero(fetches))
        return np.where(fetches, max(1, self._max_fetches // max(1, num_fetching)), 0).astype(np.int32)

    def _first_time(self, rows: ScheduledRows) -> BoolArray:
        """Which rows are asked for as the first time, bool `[n]`."""
        place, is_new = rows.place, np.zeros(len(rows), np.bool_)
        is_other = self._tenant[place] != self._books.epoch[place]
        may_be = is_other | ((self._phase[place] < 0) & (rows.num_tokens_after > self._until[place]))
        for index in np.flatnonzero(may_be).tolist():
            is_new[index] = self._is_first(rows.row(index))
        return is_new

    def _is_first(self, row: ScheduledRequest) -> bool:
        """Whether a row that was never asked for is asked for now, or how long it is not."""
        state, place, after = row.state, row.state.place, row.num_tokens_after
        self._tenant[place], self._phase[place] = self._books.epoch[place], NOT_ASKED
        if after < state.prefill_len:
            self._until[place] = state.prefill_len - 1
        elif state.policy.keeps_all(after + 1):
            self._until[place] = state.policy.keeps_all_until(after + 1) - 1
        else:
            self._phase[place] = self._farthest_phase(after)
            self._opening[place], self.lacks_chosen[place] = self._opening_steps, False
            self._prompt_len[place], self._names[place] = state.prompt_len, state.req_id
            # For the next step, with the block that it may begin
            self._set_frame(np.array([place]), np.array([after + 1], np.int32))
            return True
        return False

    def _farthest_phase(self, num_tokens: int) -> int:
        """The phase of a request that has so many tokens now."""
        asked = (state for state in self._known if self._is_asked(state.place))
        taken = [int(self._phase[state.place]) - state.num_tokens for state in asked]
        return (num_tokens + farthest(taken, self._tau)) % self._tau

    def _is_asked(self, place: int) -> bool:
        return bool(self._tenant[place] == self._books.epoch[place] and self._phase[place] >= 0)

    def _set_frame(self, place: IntArray, num_tokens: IntArray) -> None:
        """What stays in the sets of sparse requests with so many tokens, int32 `[n]`, and what is chosen beside it."""
        # All of them follow the configured policy: under another one a request keeps all its blocks
        budget, sink, recent = (of_lengths[num_tokens] for of_lengths in self._known.frames)
        end = -(-num_tokens // self._known.policy.block_size)
        first_recent = np.maximum(0, end - recent)
        sink_end = np.minimum(sink, first_recent)
        want = budget - sink_end - (end - first_recent)
        self._frame[place] = np.stack((sink_end, first_recent, end, want), axis=1)


def farthest(taken: Iterable[int], tau: int) -> int:
    """The step of a cycle, from 1 to `tau`, that is farthest from all steps taken; the last of equal ones.

    Args:
        taken: steps, also of cycles before or after; those that are taken more often than others count only.
        tau: steps of a cycle.
    """
    counts = Counter(step % tau for step in taken)
    # A whole cycle of steps, each taken equally often, tells nothing.
    least = min(counts.values()) if len(counts) == tau else 0
    marks = sorted(step for step, count in counts.items() if count > least)
    if not marks:
        return tau
    gaps = [end - start for start, end in zip(marks, [*marks[1:], marks[0] + tau], strict=True)]
    widest = max(range(len(marks)), key=lambda index: (gaps[index], index))
    return (marks[widest] + gaps[widest] // 2 - 1) % tau + 1
