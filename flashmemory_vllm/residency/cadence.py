"""When a request's blocks are scored again."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from flashmemory_vllm.residency.budget import BudgetPolicy, cdiv
from flashmemory_vllm.residency.requests import ScheduledRequest
from flashmemory_vllm.residency.types import DueSelection, Phase


class Cadence:
    """Finds the requests to score after a step: at their first sparse step, then every `tau` decode steps.

    Requests that started together come due together. At most one in `tau` of the sparse rows, rounded up, is
    scored again in one step, the longest waiting first; from the second round on they stay spread out.
    """

    def __init__(self, policy: BudgetPolicy, tau: int) -> None:
        self._policy = policy
        self._tau = tau

    def due(self, rows: Sequence[ScheduledRequest]) -> tuple[DueSelection, ...]:
        """The requests to score after this step. Counts the step for each row: call it once a step."""
        first: list[ScheduledRequest] = []
        waiting: list[ScheduledRequest] = []
        num_sparse = 0
        for row in rows:
            if row.num_tokens_after < row.state.prefill_len:
                continue
            if row.phase is Phase.PREFILL or row.state.kept_all:
                if not self._policy.keeps_all(row.num_tokens_after + 1):
                    first.append(row)
                continue
            num_sparse += 1
            row.state.steps_since_due += 1
            if row.state.steps_since_due >= self._tau:
                waiting.append(row)
        waiting.sort(key=attrgetter("state.steps_since_due"), reverse=True)
        again = waiting[: cdiv(num_sparse, self._tau)]
        return tuple(_due(row, first=True) for row in first) + tuple(_due(row, first=False) for row in again)


def _due(row: ScheduledRequest, *, first: bool) -> DueSelection:
    row.state.steps_since_due = 0
    # A copy: the scores may come many steps later, when the request and its list of blocks are long gone.
    return DueSelection(row.state.req_id, row.num_full, first, row.state.blocks.ids[: row.num_full].copy())
