"""Drives a step planner by hand. Blocks hold 4 tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flashmemory_kernels.choose_sets import ChoicePolicy

from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.residency.plan import StepPlan
from flashmemory_vllm.residency.planner import StepPlanner
from flashmemory_vllm.residency.types import Geometry, NewRequest, RunningRequest, StepInput
from tests.unit.residency.list_twin import ListTwin

BLOCK = 4
AS_NAMED = ChoicePolicy()


class Driver:
    """Drives a planner with as few words as possible, and with its own options; completes every plan."""

    def __init__(
        self,
        num_slots: int = 40,
        num_groups: int = 1,
        tau: int = 3,
        ratio: float = 0.25,
        min_sparse: int = 0,
        recent: int = 1,
        chooses: ChoicePolicy = AS_NAMED,
        **options: Any,
    ) -> None:
        # Sink of one block, and recent of one unless told otherwise: a sparse set of n blocks has max(3, ratio * n).
        policy = BudgetPolicy(BLOCK, ratio, min_sparse, 1, recent, 400, 400, 0)
        geometry = Geometry(200, num_slots, num_groups, BLOCK)
        self.planner = StepPlanner(geometry, policy, tau, **options)
        self.lists = ListTwin(self.planner, chooses)
        self.computed: dict[str, int] = {}
        self._step = 0

    def step(
        self,
        new: Sequence[NewRequest] = (),
        finished: Sequence[str] = (),
        preempted: Sequence[str] = (),
        tokens: Mapping[str, int] | None = None,
        **more_tokens: int,
    ) -> StepPlan:
        """Plan and complete one step; requests and their tokens come as keywords or as a mapping."""
        num_tokens = {**(tokens or {}), **more_tokens}
        self._step += 1
        self.computed |= {one.req_id: one.num_computed_tokens for one in new}
        fresh_ids = {one.req_id for one in new}
        running = tuple(
            RunningRequest(req_id, (), self.computed[req_id]) for req_id in num_tokens if req_id not in fresh_ids
        )
        step_input = StepInput(self._step, finished, preempted, tuple(new), running, num_tokens)
        plan = self.planner.plan(step_input, self.lists.take())
        self.lists.note(plan)
        self.planner.check_integrity()
        self.planner.complete(plan)
        self.planner.check_integrity()
        for req_id, count in num_tokens.items():
            self.computed[req_id] += count
        return plan

    def prefill(self, req_id: str, num_blocks: int, first_block: int = 1, spare_blocks: int = 4) -> StepPlan:
        """Prefill a prompt of full blocks in one step; block ids are consecutive, some for growth."""
        blocks = tuple(range(first_block, first_block + num_blocks + spare_blocks))
        return self.step([NewRequest(req_id, blocks, 0, num_blocks * BLOCK)], tokens={req_id: num_blocks * BLOCK})

    def place_of(self, req_id: str) -> int:
        """Where the tables of a known request lie."""
        state = self.planner.requests.get(req_id)
        assert state is not None
        return state.place

    def offer(self, req_id: str, num_scored: int, best: Sequence[int]) -> None:
        """A selection that likes the blocks given, the first one most, and all others by age."""
        worth = 1000 - np.arange(num_scored, dtype=np.float32)
        worth[list(best)] = 2000 - np.arange(len(best))
        groups = self.planner.lut.shape[0]
        self.lists.offer(req_id, np.tile(worth, (groups, 1)))


def positions(plan: StepPlan, req_id: str, group: int = 0) -> list[int]:
    """What a row reads; a decode row in any order."""
    return sorted(int(position) for position in plan.rows[req_id].positions[group])
