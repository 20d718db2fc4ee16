"""When a request's blocks are scored again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from operator import itemgetter

from flashmemory_vllm.residency.budget import cdiv
from flashmemory_vllm.residency.requests import RequestState, ScheduledRequest
from flashmemory_vllm.residency.types import DueSelection


class Cadence:
    """Finds the requests to score after a step: at their first sparse step, then every `tau` decode steps.

    Between the two, each of a request's first decode steps may end with a selection that is in force in the next one.

    The second time comes earlier, at the step of the cycle that is farthest from those of the other requests, so
    that requests which start together come due one by one. `hasten` makes one due at once. At most one in `tau` of the
    sparse rows, rounded up, is scored again in one step, the longest waiting first. Opening selections do not count.

    Args:
        tau: decode steps between two selections of a request.
        opening_steps: first decode steps of a request that each end with a selection of their own.
    """

    def __init__(self, tau: int, opening_steps: int) -> None:
        self._tau = tau
        self._opening_steps = opening_steps

    def due(self, rows: Sequence[ScheduledRequest], known: Iterable[RequestState]) -> tuple[DueSelection, ...]:
        """The requests to score after this step. Counts the step for each row: call it once a step.

        Args:
            rows: the scheduled requests.
            known: all known requests, scheduled or not.
        """
        first: list[ScheduledRequest] = []
        opening: list[ScheduledRequest] = []
        waiting: list[tuple[int, ScheduledRequest]] = []
        num_sparse = 0
        for row in rows:
            state = row.state
            if state.steps_since_due is None:
                if _turns_sparse(row):
                    first.append(row)
                continue
            num_sparse += 1
            state.steps_since_due += 1
            if state.opening_steps:
                state.opening_steps -= 1
                state.at_once = True
                opening.append(row)
            elif state.steps_since_due >= self._tau:
                waiting.append((state.steps_since_due, row))
        waiting.sort(key=itemgetter(0), reverse=True)
        again = [row for _, row in waiting[: cdiv(num_sparse, self._tau)]]
        for row in again:
            row.state.steps_since_due = 0
        if first:
            self._spread(first, known)
        for row in first:
            row.state.opening_steps = self._opening_steps
        return (
            *(_due(row, first=True, at_once=True) for row in first),
            *(_due(row, first=False, at_once=True) for row in opening),
            *(_due(row, first=False, at_once=False) for row in again),
        )

    def hasten(self, state: RequestState) -> bool:
        """Make a request due with its next step; false if it is anyway, or has not been due before."""
        if state.steps_since_due is None or state.steps_since_due >= self._tau - 1:
            return False
        state.steps_since_due = self._tau - 1
        return True

    def _spread(self, first: Sequence[ScheduledRequest], known: Iterable[RequestState]) -> None:
        taken = [-state.steps_since_due for state in known if state.steps_since_due is not None]
        for row in first:
            taken.append(farthest(taken, self._tau))
            row.state.steps_since_due = self._tau - taken[-1]


def farthest(taken: Iterable[int], tau: int) -> int:
    """The step of a cycle, from 1 to `tau`, that is farthest from all steps taken; the last of equal ones.

    Args:
        taken: steps, also of cycles before or after; those that are taken more often than others count only.
        tau: steps of a cycle.
    """
    counts = Counter(step % tau for step in taken)
    # A whole cycle of steps, each taken equally often, tells nothing.
    least = min(counts.values()) if len(counts) == tau else 0
    marks = sorted(step for step, count in counts.items() if count > least)
    if not marks:
        return tau
    gaps = [end - start for start, end in zip(marks, [*marks[1:], marks[0] + tau], strict=True)]
    widest = max(range(len(marks)), key=lambda index: (gaps[index], index))
    return (marks[widest] + gaps[widest] // 2 - 1) % tau + 1


def _turns_sparse(row: ScheduledRequest) -> bool:
    """Whether the request's next step is one of a sparse decode row."""
    after, state = row.num_tokens_after, row.state
    if after < state.prefill_len or (state.kept_all and after < state.settled_until):
        return False
    return not state.policy.keeps_all(after + 1)


def _due(row: ScheduledRequest, *, first: bool, at_once: bool) -> DueSelection:
    # A copy: the scores may come many steps later, when the request and its list of blocks are long gone.
    block_ids = row.state.blocks.ids[: row.num_full].copy()
    return DueSelection(row.state.req_id, row.state.prompt_len, row.num_full, first, at_once, block_ids)
