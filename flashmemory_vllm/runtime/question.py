"""The queries of a request's newest prompt tokens, its question, whatever steps they were computed in."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from flashmemory_vllm.residency.asked import AskedRow
from flashmemory_vllm.residency.batch import Batch
from flashmemory_vllm.residency.types import Row
from flashmemory_vllm.runtime.runs import within_run
from flashmemory_vllm.runtime.shape import AttentionShape


@dataclass(slots=True, eq=False)
class _Kept:
    """What is kept of one question.

    Attributes:
        queries: [Q, A, Hq, D] of the prompt's last Q tokens.
        start: index of the first one that was computed.
        end: behind the last one that was.
    """

    queries: torch.Tensor
    start: int = 0
    end: int = 0

    def fill(self, start: int, end: int) -> None:
        """Note that these are computed now; what does not meet them would leave a gap, and is given up."""
        if start <= self.end and self.start <= end:
            start, end = min(start, self.start), max(end, self.end)
        self.start, self.end = start, end


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """A piece of a question that this step computes: `batch` tokens of the step go to `place` of `queries`."""

    queries: torch.Tensor
    batch: slice
    place: slice


def question_bytes(window: int, num_anchors: int, shape: AttentionShape) -> int:
    """What the queries of so many tokens take."""
    return window * num_anchors * shape.num_query_heads * shape.head_dim * shape.dtype.itemsize


class QuestionQueries:
    """Keeps the queries of each request's last `window` prompt tokens, by position, from prefill to its end.

    A prompt may end in a step of one token, be prefilled in any chunks, be preempted before or after its end: the same
    queries are there. Tokens that a prefix hit covers have none, so the scheduler computes the question in any case
    (`FlashMemoryManager.find_longest_cache_hit`).

    Args:
        window: newest prompt tokens to keep; 0 keeps nothing.
        num_anchors: A.
        shape: the model's attention layers.
    """

    def __init__(self, window: int, num_anchors: int, shape: AttentionShape) -> None:
        self._window = window
        self._size = (num_anchors, shape.num_query_heads, shape.head_dim)
        self._dtype, self._device = shape.dtype, shape.device
        self._kept: dict[str, _Kept] = {}
        self._parts: list[_Part] = []

    def __len__(self) -> int:
        return len(self._kept)

    def set_rows(self, batch: Batch, prompt_len_of: Callable[[str], int]) -> None:
        """Learn which tokens of the batch belong to a question.

        Args:
            batch: the planned rows.
            prompt_len_of: tells how many tokens a request's prompt has.
        """
        self._parts = []
        for begin, row in batch.begins_of_prefill() if self._window else ():
            self._find(row, prompt_len_of(row.req_id), begin)

    def capture(self, anchor: int, query: torch.Tensor, first_token: int = 0) -> None:
        """Keep what one anchor layer asks for.

        Args:
            anchor: place of the layer among the anchors.
            query: [T, Hq, D], of a run of the batch's tokens.
            first_token: where the run begins in the batch. Default: 0.
        """
        for part in self._parts:
            tokens = within_run(part.batch, first_token, len(query))
            if tokens is not None:
                part.queries[part.place, anchor].copy_(query[tokens])

    def earlier(self, asked: AskedRow) -> torch.Tensor | None:
        """Queries [n, A, Hq, D] of a question, but for the row's last token; a copy, None if there are none.

        Args:
            asked: the row in the step that has just run.
        """
        kept = self._kept.get(asked.req_id)
        if kept is None:
            return None
        # Position of the row's last token, counted from the beginning of the question
        last = asked.num_tokens - 1 - (asked.prompt_len - len(kept.queries))
        known = kept.queries[kept.start : min(kept.end, last)]
        return known.clone() if len(known) else None

    def forget(self, req_ids: Iterable[str]) -> None:
        """Drop the questions of requests that ended; unknown ids are fine."""
        for req_id in req_ids:
            self._kept.pop(req_id, None)

    def reset(self) -> None:
        """Drop all questions."""
        self._kept.clear()

    def _find(self, row: Row, prompt_len: int, begin: int) -> None:
        """Find what a row computes of its question; it begins at token `begin` of the batch."""
        size = min(self._window, prompt_len)
        question = prompt_len - size
        first = max(row.num_computed_tokens, question)
        end = min(row.num_computed_tokens + row.num_tokens, prompt_len)
        if first >= end:
            return
        kept = self._kept.get(row.req_id)
        if kept is None:
            queries = torch.empty((size, *self._size), dtype=self._dtype, device=self._device)
            kept = self._kept[row.req_id] = _Kept(queries)
        kept.fill(first - question, end - question)
        begin -= row.num_computed_tokens
        batch, place = slice(begin + first, begin + end), slice(first - question, end - question)
        self._parts.append(_Part(kept.queries, batch, place))
