"""The quick way of finding rows that are chosen for, by a loop that is compiled; `Asking` describes what is asked."""

from __future__ import annotations

import numpy as np

from flashmemory_vllm.residency.asked import Ask, Asked
from flashmemory_vllm.residency.asking import Asking
from flashmemory_vllm.residency.books import Books
from flashmemory_vllm.residency.quick import asking_loops
from flashmemory_vllm.residency.quick.asking_loops import NOT_DONE, AskingArrays, RowArrays
from flashmemory_vllm.residency.registry import RequestRegistry
from flashmemory_vllm.residency.requests import ScheduledRows


class QuickAsking(Asking):
    """Asks with a loop; the first one compiles it, or reads what was compiled before."""

    def __init__(self, tau: int, opening_steps: int, max_fetches: int, known: RequestRegistry, books: Books) -> None:
        super().__init__(tau, opening_steps, max_fetches, known, books)
        frames = (np.ascontiguousarray(of_lengths, np.int32) for of_lengths in known.frames)
        self._arrays = AskingArrays(
            books.epoch, self._tenant, self._phase, self._until, self._opening, self._prompt_len, self._frame,
            self.lacks_chosen, *frames,
        )  # fmt: skip
        self._asked_quickly(ScheduledRows.none(known.policy.block_size))

    def _asked_quickly(self, rows: ScheduledRows) -> Asked | None:
        """As `asked`; None, with nothing changed, if a row may be asked for the first time."""
        fields = np.empty((len(rows), len(Ask)), np.int32)
        arrays = RowArrays(rows.place, rows.num_tokens_after, rows.first_fresh, rows.end, rows.num_full)
        num = asking_loops.ask(arrays, self._arrays, rows.block_size, self._tau, self._max_fetches, fields)
        if num == NOT_DONE:
            return None
        fields = fields[:num]
        return Asked(tuple(self._names[fields[:, Ask.PLACE]].tolist()), fields, self._books.ids)
