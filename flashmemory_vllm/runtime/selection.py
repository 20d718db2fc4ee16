"""Runs the selector for requests that are due and delivers its scores some steps later, without a stall."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch

from flashmemory_vllm.indexer.base import ScoringRequest, Selector
from flashmemory_vllm.residency.types import BoolArray, DueSelection, FloatArray, IntArray, Phase, Selection, StepPlan
from flashmemory_vllm.runtime.drift import QueryDrift
from flashmemory_vllm.runtime.selector_guard import SelectorGuard
from flashmemory_vllm.runtime.side_stream import Arrival, SideStream
from flashmemory_vllm.runtime.uploads import upload


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    """A selection on its way; `scores` is None if it has failed already."""

    req_id: str
    num_blocks: int
    scores: Arrival | None
    deliver_step: int


class SelectionQueue:
    """Scores on a stream of its own beside the model, results on the host after a fixed number of steps.

    A fixed delay, not "as soon as it has landed", so that equal requests give equal text however fast the copies
    are. A request's first selection is never delayed, it has no set to decode with yet; nor are those of its opening.
    One that fails is delivered at the same step, without scores.

    Args:
        selector: scores blocks.
        delay_steps: steps between capturing the queries and using the scores of a later selection.
        side_stream: where the selector runs.
        drift: notices requests that should be scored early. Default: nobody does.
    """

    def __init__(
        self,
        selector: Selector,
        delay_steps: int,
        side_stream: SideStream,
        drift: QueryDrift | None = None,
    ) -> None:
        self._selector = selector
        self._guard = SelectorGuard(selector)
        self._delay_steps = delay_steps
        self._side_stream = side_stream
        self._drift = drift
        self._device = selector.geometry.device
        self._pending: list[_Pending] = []
        self._num_selections: dict[str, int] = {}

    @property
    def stall_seconds(self) -> float:
        """Time in which a step waited for scores, or for who has drifted, and the device had nothing else to do."""
        return self._side_stream.stall_seconds

    @property
    def failures(self) -> Mapping[str, int]:
        """Selections that failed, by reason."""
        return self._guard.failures

    def strict(self) -> AbstractContextManager[None]:
        """Inside, what the selector raises is passed on."""
        return self._guard.strict()

    def add_blocks(
        self,
        blocks: IntArray,
        block_ids: torch.Tensor,
        keys: Sequence[torch.Tensor],
        slots: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Have the selector make the index keys of full blocks; see `SelectorGuard.add_blocks`."""
        self._guard.add_blocks(blocks, block_ids, keys, slots)

    def score(
        self,
        step: int,
        due: DueSelection,
        queries: torch.Tensor,
        resident: BoolArray | None,
        earlier: torch.Tensor | None = None,
    ) -> None:
        """Enqueue the selector for one request, after all device work enqueued so far.

        Args:
            step: the step whose forward pass has just been enqueued.
            due: the request and its full history blocks.
            queries: [A, Hq, D] of its last token; may be overwritten once this returns.
            resident: bool [G, n], the set in force; None when there is none.
            earlier: [Q, A, Hq, D] of the newest prompt tokens before it, with a first selection; not overwritten later.
        """
        index = self._num_selections.get(due.req_id, 0)
        self._num_selections[due.req_id] = index + 1
        queries = queries.clone()

        def work() -> torch.Tensor:
            ids = upload(due.block_ids.astype(np.int64), self._device)
            mask = None if resident is None else upload(resident, self._device)
            return self._selector.score(ScoringRequest(due.req_id, ids, queries, index, mask, earlier, due.prompt_len))

        delay = 0 if due.at_once else self._delay_steps
        inputs = [queries] if earlier is None else [queries, earlier]
        scores = self._guard.score(due.block_ids, lambda: self._side_stream.fetch(work, *inputs))
        self._pending.append(_Pending(due.req_id, len(due.block_ids), scores, step + 1 + delay))

    def deliver(self, step: int) -> list[Selection]:
        """The selections whose scores are used from `step` on, and those that should have been and failed."""
        ready = [pending for pending in self._pending if pending.deliver_step <= step]
        self._pending = [pending for pending in self._pending if pending.deliver_step > step]
        return [Selection(pending.req_id, self._scores_of(pending)) for pending in ready]

    def watch(self, plan: StepPlan, row_of: Mapping[str, int]) -> None:
        """Compare the queries of the step that was just enqueued with those that its requests were scored with.

        Args:
            plan: the step's.
            row_of: where the queries of each of its requests lie.
        """
        if self._drift is not None:
            scored = {due.req_id: row_of[due.req_id] for due in plan.due}
            decoding = {req_id: row_of[req_id] for req_id, row in plan.rows.items() if row.phase is Phase.DECODE}
            self._drift.compare(plan.step, scored, decoding)

    def drifted(self, step: int) -> Sequence[str]:
        """Requests whose queries have turned away from those of their last selection, as it is known from `step` on."""
        return () if self._drift is None else self._drift.drifted(step)

    def preempt(self, req_ids: Collection[str]) -> None:
        """Drop what is under way for requests that lost their blocks; what is known of their questions stays."""
        gone = set(req_ids)
        self._pending = [pending for pending in self._pending if pending.req_id not in gone]
        if self._drift is not None:
            self._drift.forget(req_ids)

    def forget(self, req_ids: Collection[str]) -> None:
        """Drop what is kept for requests that ended."""
        self.preempt(req_ids)
        for req_id in req_ids:
            self._num_selections.pop(req_id, None)
            self._guard.forget(req_id)

    def warm_up(self, queries: torch.Tensor, num_groups: int) -> None:
        """Score the null block for a request that does not exist, the first time and again.

        Args:
            queries: [A, Hq, D].
            num_groups: G.
        """
        block_size, null_block = self._selector.geometry.block_size, np.zeros(1, np.int32)
        for step, first in enumerate((True, False)):
            due = DueSelection("", block_size, 1, first, first, null_block)
            resident = None if first else np.ones((num_groups, 1), np.bool_)
            # A first selection with more tokens than one, as a question has them
            self.score(step, due, queries, resident, queries.unsqueeze(0) if first else None)
        self.deliver(self._delay_steps + 2)
        if self._drift is not None:
            self._drift.warm_up()
        self.forget([""])

    def reset(self) -> None:
        """Forget every request."""
        self.forget([*self._num_selections])

    def _scores_of(self, pending: _Pending) -> FloatArray | None:
        if pending.scores is None:
            return None
        scores: FloatArray = self._side_stream.wait(pending.scores).numpy()
        return scores if self._guard.accepts(scores, pending.num_blocks) else None
