"""Runs the selector for requests that are due and delivers its scores some steps later, without a stall."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flashmemory_vllm.indexer.base import ScoringRequest, Selector
from flashmemory_vllm.residency.types import DueSelection, Selection


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    req_id: str
    scores_host: torch.Tensor
    landed: torch.cuda.Event | None
    deliver_step: int

    def wait(self) -> Selection:
        if self.landed is not None:
            self.landed.synchronize()
        return Selection(self.req_id, self.scores_host.numpy())


class SelectionQueue:
    """Scores on the device, results on the host after a fixed number of steps.

    A fixed delay, not "as soon as it has landed", so that equal requests give equal text however fast the copies
    are. A request's first selection is never delayed: it has no set to decode with yet.

    Args:
        selector: scores blocks.
        delay_steps: steps between capturing the queries and using the scores of a later selection.
    """

    def __init__(self, selector: Selector, delay_steps: int) -> None:
        self._selector = selector
        self._delay_steps = delay_steps
        self._pending: list[_Pending] = []
        self._num_selections: dict[str, int] = {}

    def score(self, step: int, due: DueSelection, queries: torch.Tensor, resident: torch.Tensor | None) -> None:
        """Enqueue the selector for one request.

        Args:
            step: the step whose forward pass has just been enqueued.
            due: the request and its full history blocks.
            queries: [A, Hq, D] of its last token.
            resident: bool [G, n], the set in force; None when there is none.
        """
        device = queries.device
        block_ids = torch.from_numpy(due.block_ids.astype("int64"))
        index = self._num_selections.get(due.req_id, 0)
        self._num_selections[due.req_id] = index + 1
        on_cuda = device.type == "cuda"
        ids = block_ids.pin_memory().to(device, non_blocking=True) if on_cuda else block_ids
        scores = self._selector.score(ScoringRequest(due.req_id, ids, queries, index, resident))
        landed: torch.cuda.Event | None = None
        if on_cuda:
            scores_host = torch.empty(scores.shape, dtype=scores.dtype, pin_memory=True)
            scores_host.copy_(scores, non_blocking=True)
            landed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            landed.record()
        else:
            scores_host = scores
        delay = 0 if due.first else self._delay_steps
        self._pending.append(_Pending(due.req_id, scores_host, landed, step + 1 + delay))

    def deliver(self, step: int) -> list[Selection]:
        """The selections whose scores are used from `step` on."""
        ready = [pending for pending in self._pending if pending.deliver_step <= step]
        self._pending = [pending for pending in self._pending if pending.deliver_step > step]
        return [pending.wait() for pending in ready]

    def forget(self, req_ids: Sequence[str]) -> None:
        """Drop what is kept for requests that ended or were preempted."""
        gone = set(req_ids)
        self._pending = [pending for pending in self._pending if pending.req_id not in gone]
        for req_id in gone:
            self._num_selections.pop(req_id, None)
            self._selector.forget(req_id)

    def reset(self) -> None:
        """Forget every request."""
        self.forget([*self._num_selections])
