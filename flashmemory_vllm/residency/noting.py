"""What lists tell beside who comes and who goes: counted, and kept for the next selections."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashmemory_vllm.residency.asked import Ask
from flashmemory_vllm.residency.books import Books
from flashmemory_vllm.residency.came import Came
from flashmemory_vllm.residency.counters import Counters
from flashmemory_vllm.residency.entries import NO_ENTRY
from flashmemory_vllm.residency.fallback import DenseFallback
from flashmemory_vllm.residency.lists import COMES, GOES, HEADER, NOBODY, WORTH, Chosen, Pairs
from flashmemory_vllm.residency.registry import RequestRegistry
from flashmemory_vllm.residency.requests import RequestState
from flashmemory_vllm.residency.types import BoolArray, IntArray


class ListNotes:
    """Counts what lists have chosen, and what became of it.

    Args:
        books: the tables.
        known: the known requests, live.
        counters: take what is counted.
        fallback: lets requests keep all their blocks. Default: None, it never does.
        lacks_chosen: bool `[P]`, see `Asking`.
    """

    def __init__(
        self,
        books: Books,
        known: RequestRegistry,
        counters: Counters,
        fallback: DenseFallback | None,
        lacks_chosen: BoolArray,
    ) -> None:
        self._books = books
        self._known = known
        self._counters = counters
        self._fallback = fallback
        self._lacks_chosen = lacks_chosen
        # The last tenant of each place that was selected for; who falls back; what came into sets since then
        self._selected: IntArray = np.full(books.epoch.size, NOBODY, np.int32)
        self._falls_back: BoolArray = np.zeros(books.epoch.size, np.bool_)
        self._came = Came(len(books.groups))

    def note_quickly(self, chosen: Chosen, pairs: Sequence[Pairs]) -> BoolArray:
        """All that is noted of a list that has come into force by `Books.apply_quickly`.

        Args:
            chosen: the list; nobody in it is new, and nobody falls back.
            pairs: what it has changed.

        Returns:
            Bool `[n]` rows that are selections of requests that are there.
        """
        raise NotImplementedError

    def latency(self, chosen: Chosen, num_selected: int) -> None:
        """So many selections of a list have come in time for requests that are there."""
        if num_selected:
            self._counters.selection_latency_seconds.observe(np.full(num_selected, chosen.seconds))

    def full(self, fields: IntArray, rows: IntArray) -> None:
        """Which lists have left out blocks that were chosen, for lack of room: of rows that may fetch.

        Args:
            fields: int32 `[n, len(Ask)]` what was asked.
            rows: int32 `[n, G, 6 + 2 L]` the answers.
        """
        fetching = fields[:, Ask.CAP] > 0
        longest, caps = (rows.shape[2] - HEADER) // 2, fields[fetching, Ask.CAP]
        comes, goes = rows[fetching, :, COMES], rows[fetching, :, GOES]
        is_full = (comes >= np.minimum(caps, longest)[:, None]) | (goes >= longest)
        self._lacks_chosen[fields[fetching, Ask.PLACE]] = is_full.any(1)

    def selections(self, chosen: Chosen, is_selected: BoolArray) -> None:
        """What selections found worth a slot and chose, and which requests fall back for it.

        Args:
            chosen: the list.
            is_selected: bool `[n]` rows of it that are selections of requests that are there.
        """
        at = np.flatnonzero(is_selected)
        if not at.size:
            return
        fields, num_groups = chosen.asked.fields[at], len(self._books.groups)
        place, num_candidates = fields[:, Ask.PLACE], num_groups * chosen.asked.num_candidates[at]
        worth, comes = chosen.rows[at, :, WORTH], chosen.rows[at, :, COMES].sum(1)
        is_counted = np.ones(at.size, np.bool_)
        for index, row in enumerate(at.tolist() if self._fallback is not None else ()):
            state = self._known.get(chosen.asked.req_ids[row])
            assert state is not None  # it is still the tenant of its place
            state.selection = self._counters.selections + index + 1
            self._learn(state, int(worth[index].sum()), int(num_candidates[index]))
            is_counted[index] = not state.falls_back
        num_chosen = np.minimum(worth, fields[:, Ask.WANT, None]).sum(1)
        is_again = is_counted & (self._selected[place] == fields[:, Ask.EPOCH])
        self._selected[place] = fields[:, Ask.EPOCH]
        counters = self._counters
        counters.selections += at.size
        counters.selection_candidates += int(num_candidates @ is_counted)
        counters.selected_blocks += int(num_chosen @ is_counted)
        num_again = int(num_chosen @ is_again)
        counters.reselected_blocks += num_again
        counters.reselected_resident_blocks += num_again - int(comes @ is_again)

    def changes(self, place: IntArray, pairs: Sequence[Pairs]) -> None:
        """A list is in force: what came since the selections before is judged by what these leave in the sets.

        Args:
            place: int32 `[n]` whose selections it brings.
            pairs: what it has changed.
        """
        for group, came in enumerate(self._came.take(place, self._books.epoch)):
            entries = self._books.groups[group]
            of_place, position = came if self._fallback is None else came[:, ~self._falls_back[came[0]]]
            is_chosen = (entries.entry[of_place, position] != NO_ENTRY) & ~entries.is_extra[of_place, position]
            self._counters.judged_prefetches += position.size
            self._counters.useful_prefetches += int(np.count_nonzero(is_chosen))
        self._came.add(pairs, self._books.epoch)

    def _learn(self, state: RequestState, num_worth: int, num_candidates: int) -> None:
        assert self._fallback is not None  # it is asked for only then
        self._fallback.learn(state, num_worth, num_candidates)
        self._falls_back[state.place] = state.falls_back
