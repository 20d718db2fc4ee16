"""The quick way of noting what lists tell, by loops that are compiled; `ListNotes` describes what is noted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashmemory_vllm.residency.asked import Ask
from flashmemory_vllm.residency.books import Books
from flashmemory_vllm.residency.counters import Counters
from flashmemory_vllm.residency.fallback import DenseFallback
from flashmemory_vllm.residency.lists import Chosen, Pairs
from flashmemory_vllm.residency.noting import ListNotes
from flashmemory_vllm.residency.quick import note_loops
from flashmemory_vllm.residency.quick.books import QuickBooks
from flashmemory_vllm.residency.registry import RequestRegistry
from flashmemory_vllm.residency.types import BoolArray, IntArray


class QuickNotes(ListNotes):
    """Notes with loops; the first ones compile them, or read what was compiled before."""

    def __init__(
        self,
        books: Books,
        known: RequestRegistry,
        counters: Counters,
        fallback: DenseFallback | None,
        lacks_chosen: BoolArray,
    ) -> None:
        super().__init__(books, known, counters, fallback, lacks_chosen)
        assert isinstance(books, QuickBooks)  # whoever makes one makes the other
        self._of_tables = books.tables
        self._counts = np.zeros(note_loops.NUM_COUNTS, np.int64)
        self._is_asked: BoolArray = np.zeros(books.epoch.size, np.bool_)
        nothing = np.empty((0, len(books.groups), note_loops.HEADER), np.int32)
        self._note(
            nothing,
            np.empty((0, len(Ask)), np.int32),
            np.zeros(0, np.bool_),
            [Pairs(*np.empty((3, 0), np.int32))] * len(books.groups),
        )

    def note_quickly(self, chosen: Chosen, pairs: Sequence[Pairs]) -> BoolArray:
        """All that is noted of a list that has come into force by `Books.apply_quickly`: see there."""
        counters, is_selected = self._counters, chosen.is_selected.copy()
        self._note(chosen.rows, chosen.asked.fields, is_selected, pairs)
        num, candidates, num_chosen, again, resident, judged, useful = self._counts.tolist()
        self.latency(chosen, num)
        counters.selections += num
        counters.selection_candidates += candidates
        counters.selected_blocks += num_chosen
        counters.reselected_blocks += again
        counters.reselected_resident_blocks += resident
        counters.judged_prefetches += judged
        counters.useful_prefetches += useful
        return is_selected

    def _note(self, rows: IntArray, asked: IntArray, is_selected: BoolArray, pairs: Sequence[Pairs]) -> None:
        epoch, counts, is_asked = self._books.epoch, self._counts, self._is_asked
        counts[:] = 0
        is_asked[:] = False
        note_loops.note_rows(rows, asked, is_selected, epoch, self._selected, self._lacks_chosen, is_asked, counts)
        for group, (table, of_group) in enumerate(zip(self._of_tables, pairs, strict=True)):
            came, num = self._came.with_room(group, of_group.place.size), self._came.nums[group]
            self._came.nums[group] = note_loops.judge(came, num, of_group.place, of_group.come, is_asked, table, counts)
