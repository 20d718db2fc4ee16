"""Notices requests whose queries have turned away from those that their resident set was selected with."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from flashmemory_vllm.runtime.queries import QueryRing
from flashmemory_vllm.runtime.side_stream import Arrival, SideStream
from flashmemory_vllm.runtime.uploads import upload


@dataclass(frozen=True, slots=True)
class _Reference:
    place: int
    step: int


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    step: int
    req_ids: tuple[str, ...]
    cosines: Arrival


class QueryDrift:
    """Compares each decode row's queries with those of its last selection, all rows at once, beside the model.

    A row has drifted if the mean, over anchor layers and heads, of the cosine between the two is below the threshold.
    What a step finds is read a fixed number of steps later, like the scores of a selection.

    Args:
        threshold: cosine in 0 to 1.
        delay_steps: steps that the answer is late.
        queries: where attention leaves the queries.
        side_stream: where the comparison runs.
    """

    def __init__(self, threshold: float, delay_steps: int, queries: QueryRing, side_stream: SideStream) -> None:
        self._threshold = threshold
        self._delay_steps = delay_steps
        self._queries = queries
        self._side_stream = side_stream
        self._selected_with = torch.zeros_like(queries.all_rows)
        self._references: dict[str, _Reference] = {}
        self._free_places = list(range(self._selected_with.shape[1]))
        self._pending: list[_Pending] = []
        self._uploaded: tuple[list[int], torch.Tensor] | None = None

    def compare(self, step: int, due: Mapping[str, int], decoding: Mapping[str, int]) -> None:
        """Keep the queries of rows that are scored now, and compare those of the others; enqueues work only.

        Args:
            step: the step whose forward pass has just been enqueued.
            due: row of the queries of each request that is scored with those of this step.
            decoding: that of each decode row. Those that are due, or never were, are left out.
        """
        for req_id in due:
            known = self._references.get(req_id)
            place = self._free_places.pop() if known is None else known.place
            self._references[req_id] = _Reference(place, step)
        compared = [req_id for req_id in decoding if req_id in self._references and req_id not in due]
        if not due and not compared:
            return
        rows = [*due.values(), *(decoding[req_id] for req_id in compared)]
        places = [self._references[req_id].place for req_id in (*due, *compared)]
        index = self._upload(rows + places)
        num_due, num_rows = len(due), len(rows)
        queries = self._queries.rows(index[:num_rows])
        reference = self._selected_with

        def work() -> torch.Tensor:
            reference.index_copy_(1, index[num_rows : num_rows + num_due], queries[:, :num_due])
            selected_with = reference.index_select(1, index[num_rows + num_due :])
            per_head = functional.cosine_similarity(queries[:, num_due:].float(), selected_with.float(), dim=-1)
            return per_head.mean((0, 2))

        cosines = self._side_stream.fetch(work, queries, index)
        if compared:
            self._pending.append(_Pending(step, tuple(compared), cosines))

    def drifted(self, step: int) -> list[str]:
        """Requests that have drifted, as it is known from `step` on, and were not selected for since."""
        ready = [pending for pending in self._pending if pending.step + 1 + self._delay_steps <= step]
        self._pending = self._pending[len(ready) :]
        return [req_id for pending in ready for req_id in self._below(pending)]

    def forget(self, req_ids: Iterable[str]) -> None:
        """Drop what is kept for requests that ended or were preempted; unknown ids are fine."""
        for req_id in req_ids:
            reference = self._references.pop(req_id, None)
            if reference is not None:
                self._free_places.append(reference.place)

    def warm_up(self) -> None:
        """Compare a request that does not exist with itself."""
        self.compare(0, {"": 0}, {})
        self.compare(1, {}, {"": 0})
        self.drifted(2 + self._delay_steps)
        self.forget([""])

    def _below(self, pending: _Pending) -> list[str]:
        cosines = self._side_stream.wait(pending.cosines).tolist()
        pairs = zip(pending.req_ids, cosines, strict=True)
        return [req_id for req_id, cosine in pairs if cosine < self._threshold and self._is_current(req_id, pending)]

    def _is_current(self, req_id: str, pending: _Pending) -> bool:
        reference = self._references.get(req_id)
        return reference is not None and reference.step < pending.step

    def _upload(self, numbers: list[int]) -> torch.Tensor:
        """The numbers on the device; in most steps they are those of the step before."""
        if self._uploaded is None or self._uploaded[0] != numbers:
            self._uploaded = numbers, upload(np.array(numbers, np.int64), self._selected_with.device)
        return self._uploaded[1]
