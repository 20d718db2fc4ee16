"""The last selections of a worker: what each one changed, what it had fetched, and whether a step waited for it."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from flashmemory_vllm.residency.plan import StepPlan
from flashmemory_vllm.residency.planner import StepPlanner
from flashmemory_vllm.residency.requests import RequestState
from flashmemory_vllm.residency.types import Copies, IntArray

MAX_SELECTIONS = 16
# Fences whose selections are remembered until it is known whether they waited.
MAX_FENCES = 8
FORGET_STEPS = 32


class Fences(Protocol):
    """The part of a transfer engine that is asked which steps had to wait."""

    @property
    def num_fences(self) -> int:
        """See `TransferEngine`."""

    def take_late_fences(self) -> list[int]:
        """See `TransferEngine`."""


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """What some decode rows read in a step, copied.

    Attributes:
        step: number of the step.
        num_blocks: blocks of each request that held tokens after it.
        positions: per group int32 `[n, k]`, the blocks of each row in any order, and `[n]` how many of them there are.
    """

    step: int
    num_blocks: Sequence[int]
    positions: Sequence[tuple[IntArray, IntArray]]

    def of(self, row: int) -> list[IntArray]:
        """Per group int32 `[k]` positions of one row, ascending."""
        return [np.sort(positions[row, : counts[row]]) for positions, counts in self.positions]


@dataclass(slots=True, eq=False)
class Selections:
    """The selections that came into force in one step; names no request.

    Attributes:
        tables: what their rows read from then on.
        before: of each row what it read by its selection before, and which row it was there; None if it had none.
        copies: what the step recalled and prefetched.
        waited: the step waited for these copies.
    """

    tables: Tables
    before: list[tuple[Tables, int] | None]
    copies: tuple[Copies, ...]
    waited: bool = False


class Cycle(NamedTuple):
    """One selection that came into force. What it changed is worked out when it is asked for.

    Positions are those of blocks within the request.

    Attributes:
        state: the request.
        selections: all that came into force with it.
        row: which of them it is.
    """

    state: RequestState
    selections: Selections
    row: int

    @property
    def step(self) -> int:
        """The step that it was first planned with."""
        return self.selections.tables.step

    @property
    def first(self) -> bool:
        """The request had none before."""
        return self.selections.before[self.row] is None

    @property
    def num_blocks(self) -> int:
        """Blocks of the request that held tokens after that step."""
        return self.selections.tables.num_blocks[self.row]

    @property
    def chosen(self) -> list[IntArray]:
        """Per group int32 `[k]`, the blocks of the set, ascending."""
        return self.selections.tables.of(self.row)

    @property
    def recalled(self) -> list[IntArray]:
        """Per group int32 `[m]`, blocks of the request that had to come from the host in that step, ascending."""
        ids = self.state.blocks.ids[: self.num_blocks]
        is_recalled = [np.zeros(ids.size, np.bool_) for _ in self.selections.tables.positions]
        for copies in self.selections.copies:
            is_recalled[copies.group] |= np.isin(ids, copies.blocks)
        return [np.flatnonzero(of_group).astype(np.int32) for of_group in is_recalled]

    @property
    def num_changed(self) -> int:
        """Blocks that the selection before it had not chosen, over all groups.

        Blocks that did not exist then do not count. All chosen ones if it is the first.
        """
        before = self.selections.before[self.row]
        if before is None:
            return sum(positions.size for positions in self.chosen)
        tables, row = before
        return sum(
            int(np.count_nonzero(~np.isin(positions[positions < tables.num_blocks[row]], earlier)))
            for positions, earlier in zip(self.chosen, tables.of(row), strict=True)
        )

    @property
    def late(self) -> bool:
        """The step waited for copies, some of `recalled` among them."""
        return self.selections.waited and any(map(len, self.recalled))


class SelectionHistory:
    """Notes each selection as it comes into force: what a step changes is copied, and looked at when somebody asks.

    Args:
        planner: whose selections.
        fences: of the engine that moves the blocks; whether one had to wait is known some steps later.
    """

    def __init__(self, planner: StepPlanner, fences: Fences) -> None:
        self._planner = planner
        self._fences = fences
        self._latest: dict[str, Cycle] = {}
        self._last: deque[Cycle] = deque(maxlen=MAX_SELECTIONS)
        self._behind: dict[int, Selections] = {}
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
        new = self._begin(plan) if plan.selected else None
        self._note_fence(new if plan.recalls or plan.prefetches else None)
        # Who is gone is forgotten at once if nobody has come since, and within some steps in any case
        if len(self._latest) > len(self._planner.requests) or (new is not None and plan.step % FORGET_STEPS == 0):
            get = self._planner.requests.get
            self._latest = {req_id: cycle for req_id, cycle in self._latest.items() if get(req_id) is cycle.state}

    def _note_fence(self, new: Selections | None) -> None:
        """Learn whose blocks the step's fence is for, and which of the fences so far had to wait."""
        number = self._fences.num_fences
        if new is not None:
            self._behind[number] = new
        for fence in self._fences.take_late_fences():
            if fence in self._behind:
                self._behind.pop(fence).waited = True
        if self._behind:
            self._behind = {fence: behind for fence, behind in self._behind.items() if fence > number - MAX_FENCES}

    def _begin(self, plan: StepPlan) -> Selections:
        block_size, states = self._planner.geometry.block_size, []
        for req_id in plan.selected:
            state = self._planner.requests.get(req_id)
            assert state is not None  # it is scheduled
            states.append(state)
        positions = self._planner.tables_of([state.place for state in states])
        num_blocks = [-(-state.num_tokens // block_size) for state in states]
        before = [
            None if cycle is None else (cycle.selections.tables, cycle.row) for cycle in map(self.cycle_of, states)
        ]
        tables = Tables(plan.step, num_blocks, positions)
        selections = Selections(tables, before, (*plan.recalls, *plan.prefetches))
        cycles = [Cycle(state, selections, row) for row, state in enumerate(states)]
        self._latest.update(zip(plan.selected, cycles, strict=True))
        self._last.extend(cycles[-MAX_SELECTIONS:])
        return selections
