"""The last selections of a worker: what each one changed, what it had fetched, and whether a step waited for it."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from flashmemory_vllm.residency.planner import StepPlanner
from flashmemory_vllm.residency.requests import RequestState
from flashmemory_vllm.residency.types import NOTHING, IntArray, StepPlan

MAX_SELECTIONS = 16
# Fences whose selections are remembered until it is known whether they waited.
MAX_FENCES = 8


class Fences(Protocol):
    """The part of a transfer engine that is asked which steps had to wait."""

    @property
    def num_fences(self) -> int:
        """See `TransferEngine`."""

    def take_late_fences(self) -> list[int]:
        """See `TransferEngine`."""


@dataclass(slots=True, eq=False)
class Cycle:
    """One selection that came into force. Positions are those of blocks within the request.

    Attributes:
        state: the request.
        step: the step that it was first planned with.
        first: the request had none before.
        num_blocks: blocks of the request that held tokens after that step.
        chosen: per group int32 `[k]`, the blocks of the set.
        recalled: per group int32 `[m]`, those of them that had to come from the host.
        num_changed: blocks that the selection before it had not chosen, over all groups; blocks that did not
            exist then do not count. All chosen ones if it is the first.
        late: the step waited for copies, some of `recalled` among them.
    """

    state: RequestState
    step: int
    first: bool
    num_blocks: int
    chosen: tuple[IntArray, ...]
    recalled: tuple[IntArray, ...]
    num_changed: int
    late: bool = False


class SelectionHistory:
    """Notes each selection as it comes into force.

    Args:
        planner: whose selections.
        fences: of the engine that moves the blocks; whether one had to wait is known some steps later.
    """

    def __init__(self, planner: StepPlanner, fences: Fences) -> None:
        self._planner = planner
        self._fences = fences
        self._latest: dict[str, Cycle] = {}
        self._last: deque[Cycle] = deque(maxlen=MAX_SELECTIONS)
        self._behind: dict[int, list[Cycle]] = {}
        self.step = 0

    def __iter__(self) -> Iterator[Cycle]:
        """The last selections, the newest first."""
        return reversed(self._last)

    def cycle_of(self, state: RequestState) -> Cycle | None:
        """The selection that a request's set follows."""
        cycle = self._latest.get(state.req_id)
        return cycle if cycle is not None and cycle.state is state else None

    def note(self, plan: StepPlan) -> None:
        """Learn of a step, after its recalls are fenced and before its plan is complete."""
        self.step = plan.step
        new = [self._begin(req_id, plan) for req_id in plan.selected]
        self._note_fence([cycle for cycle in new if any(map(len, cycle.recalled))])
        if new or len(self._latest) > len(self._planner.requests):
            self._forget_gone()

    def _note_fence(self, due: list[Cycle]) -> None:
        """Learn whose blocks the step's fence is for, and which of the fences so far had to wait."""
        number = self._fences.num_fences
        if due:
            self._behind[number] = due
        for fence in self._fences.take_late_fences():
            for cycle in self._behind.get(fence, ()):
                cycle.late = True
        known = ((fence, [*filter(self._knows, cycles)]) for fence, cycles in self._behind.items())
        self._behind = {fence: cycles for fence, cycles in known if cycles and fence > number - MAX_FENCES}

    def _begin(self, req_id: str, plan: StepPlan) -> Cycle:
        state, row = self._planner.requests.get(req_id), plan.rows[req_id]
        assert state is not None  # it is scheduled
        before = self.cycle_of(state)
        num_blocks = -(-(row.num_computed_tokens + row.num_tokens) // self._planner.geometry.block_size)
        chosen = tuple(np.sort(positions) for positions in row.positions)
        cycle = Cycle(
            state=state,
            step=plan.step,
            first=before is None,
            num_blocks=num_blocks,
            chosen=chosen,
            recalled=_recalled(state, plan),
            num_changed=_num_changed(chosen, before),
        )
        self._latest[state.req_id] = cycle
        self._last.append(cycle)
        return cycle

    def _forget_gone(self) -> None:
        self._latest = {req_id: cycle for req_id, cycle in self._latest.items() if self._knows(cycle)}

    def _knows(self, cycle: Cycle) -> bool:
        return self._planner.requests.get(cycle.state.req_id) is cycle.state


def _recalled(state: RequestState, plan: StepPlan) -> tuple[IntArray, ...]:
    """Per group the positions that this plan recalls or prefetches."""
    recalled = [NOTHING] * len(plan.rows[state.req_id].positions)
    for copies in (*plan.recalls, *plan.prefetches):
        now = np.flatnonzero(np.isin(state.blocks.ids, copies.blocks)).astype(np.int32)
        recalled[copies.group] = np.union1d(recalled[copies.group], now)
    return tuple(recalled)


def _num_changed(chosen: tuple[IntArray, ...], before: Cycle | None) -> int:
    if before is None:
        return sum(positions.size for positions in chosen)
    return sum(
        int(np.count_nonzero(~np.isin(positions[positions < before.num_blocks], earlier)))
        for positions, earlier in zip(chosen, before.chosen, strict=True)
    )
