"""Runs the selector for requests that are due and delivers its scores some steps later, without a stall."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from flashmemory_vllm.indexer.base import ScoringRequest, Selector
from flashmemory_vllm.residency.types import BoolArray, DueSelection, Selection
from flashmemory_vllm.runtime.uploads import upload


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    req_id: str
    scores_host: torch.Tensor
    captured: torch.cuda.Event | None
    landed: torch.cuda.Event | None
    deliver_step: int

    def wait(self) -> float:
        """Block until the scores are there; seconds of it in which the device was done with the step they score."""
        if self.captured is None or self.landed is None:
            return 0.0
        self.captured.synchronize()
        started = time.perf_counter()
        self.landed.synchronize()
        return time.perf_counter() - started


class SelectionQueue:
    """Scores on a stream of its own beside the model, results on the host after a fixed number of steps.

    A fixed delay, not "as soon as it has landed", so that equal requests give equal text however fast the copies
    are. A request's first selection is never delayed: it has no set to decode with yet.

    Args:
        selector: scores blocks.
        delay_steps: steps between capturing the queries and using the scores of a later selection.
        device: where the selector's index lies.

    Attributes:
        stall_seconds: time in which a step waited for scores and the device had nothing else to do.
    """

    def __init__(self, selector: Selector, delay_steps: int, device: torch.device) -> None:
        self._selector = selector
        self._delay_steps = delay_steps
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pending: list[_Pending] = []
        self._num_selections: dict[str, int] = {}
        self.stall_seconds = 0.0

    def score(self, step: int, due: DueSelection, queries: torch.Tensor, resident: BoolArray | None) -> None:
        """Enqueue the selector for one request, after all device work enqueued so far.

        Args:
            step: the step whose forward pass has just been enqueued.
            due: the request and its full history blocks.
            queries: [A, Hq, D] of its last token; may be overwritten once this returns.
            resident: bool [G, n], the set in force; None when there is none.
        """
        index = self._num_selections.get(due.req_id, 0)
        self._num_selections[due.req_id] = index + 1
        queries = queries.clone()
        captured: torch.cuda.Event | None = None
        landed: torch.cuda.Event | None = None
        if self._stream is not None:
            captured = torch.cuda.current_stream(self._device).record_event()
        with self._beside_the_model(queries):
            ids = upload(due.block_ids.astype(np.int64), self._device)
            mask = None if resident is None else upload(resident, self._device)
            scores = self._selector.score(ScoringRequest(due.req_id, ids, queries, index, mask))
            scores_host = scores
            if self._stream is not None:
                scores_host = torch.empty(scores.shape, dtype=scores.dtype, pin_memory=True)
                scores_host.copy_(scores, non_blocking=True)
                landed = torch.cuda.Event()  # type: ignore[no-untyped-call]
                landed.record()
        delay = 0 if due.first else self._delay_steps
        self._pending.append(_Pending(due.req_id, scores_host, captured, landed, step + 1 + delay))

    def deliver(self, step: int) -> list[Selection]:
        """The selections whose scores are used from `step` on."""
        ready = [pending for pending in self._pending if pending.deliver_step <= step]
        self._pending = [pending for pending in self._pending if pending.deliver_step > step]
        self.stall_seconds += sum(pending.wait() for pending in ready)
        return [Selection(pending.req_id, pending.scores_host.numpy()) for pending in ready]

    def forget(self, req_ids: Sequence[str]) -> None:
        """Drop what is kept for requests that ended or were preempted."""
        gone = set(req_ids)
        self._pending = [pending for pending in self._pending if pending.req_id not in gone]
        for req_id in gone:
            self._num_selections.pop(req_id, None)
            self._selector.forget(req_id)

    def warm_up(self, queries: torch.Tensor, num_groups: int) -> None:
        """Score the null block for a request that does not exist, the first time and again.

        Args:
            queries: [A, Hq, D].
            num_groups: G.
        """
        null_block = np.zeros(1, np.int32)
        for step, first in enumerate((True, False)):
            resident = None if first else np.ones((num_groups, 1), np.bool_)
            self.score(step, DueSelection("", 1, first, null_block), queries, resident)
        self.deliver(self._delay_steps + 2)
        self.forget([""])

    def reset(self) -> None:
        """Forget every request."""
        self.forget([*self._num_selections])

    @contextmanager
    def _beside_the_model(self, queries: torch.Tensor) -> Iterator[None]:
        """Enqueue on the selector's stream; what it allocates there is reused in the order of that stream."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        # Allocated on the compute stream: not to be given out again before the selector has read it.
        queries.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield
