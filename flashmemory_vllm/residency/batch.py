"""The rows of a step as arrays; a `Row` of its own is made for a decode row only when somebody asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flashmemory_vllm.residency.types import IntArray, Phase, Row


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows in the order of a batch; for their attributes see `Row`.

    Attributes:
        place: int32 `[n]` where the tables of each row lie.
        num_computed_tokens: int32 `[n]`.
        num_tokens: int32 `[n]`.
        evicted_tokens: int32 `[n, G]`.
        prefill: the rows that attend to all their history, by their index, ascending.
    """

    place: IntArray
    num_computed_tokens: IntArray
    num_tokens: IntArray
    evicted_tokens: IntArray
    prefill: Mapping[int, Row]

    @classmethod
    def of(cls, rows: Sequence[Row], places: Sequence[int]) -> Batch:
        """These rows, of requests at these places."""
        num_groups = len(rows[0].evicted_tokens) if rows else 1
        return cls(
            np.array(places, np.int32),
            np.array([row.num_computed_tokens for row in rows], np.int32),
            np.array([row.num_tokens for row in rows], np.int32),
            np.array([row.evicted_tokens for row in rows], np.int32).reshape(len(rows), num_groups),
            {index: row for index, row in enumerate(rows) if row.phase is Phase.PREFILL},
        )

    def __len__(self) -> int:
        return self.place.size

    def begins_of_prefill(self) -> Iterator[tuple[int, Row]]:
        """The prefill rows, each with the tokens of the batch before its own."""
        if self.prefill:
            begins = np.cumsum(self.num_tokens) - self.num_tokens
            for index, row in self.prefill.items():
                yield int(begins[index]), row


class PlannedRows(Mapping[str, Row]):
    """The rows of a step by request, in the order of the scheduler.

    Args:
        req_ids: vLLM's request ids.
        batch: their rows.
        read: makes the row of an index that decodes.
    """

    def __init__(self, req_ids: Sequence[str], batch: Batch, read: Callable[[int], Row]) -> None:
        self._index = {req_id: index for index, req_id in enumerate(req_ids)}
        self._batch, self._read = batch, read

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __getitem__(self, req_id: str) -> Row:
        index = self._index[req_id]
        row = self._batch.prefill.get(index)
        return self._read(index) if row is None else row

    @property
    def has_prefill(self) -> bool:
        """Whether a row attends to all its history."""
        return bool(self._batch.prefill)

    def batch(self, req_ids: Sequence[str]) -> Batch:
        """The rows of these requests, in this order."""
        index, of = [self._index[req_id] for req_id in req_ids], self._batch
        if index == [*range(len(of))]:
            return of
        at = np.array(index, np.int32)
        prefill = {new: of.prefill[old] for new, old in enumerate(index) if old in of.prefill} if of.prefill else {}
        return Batch(of.place[at], of.num_computed_tokens[at], of.num_tokens[at], of.evicted_tokens[at], prefill)
