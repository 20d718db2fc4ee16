"""Random histories: a scheduler drives the planner, a memory of tags executes and checks its plans.

`FLASHMEMORY_HISTORIES=thorough` runs many more and longer ones.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from random import Random

import numpy as np
import pytest
from flashmemory_kernels.choose_sets import ChoicePolicy
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from flashmemory_vllm.residency.budget import STEPS_TO_FORCE, BudgetPolicy, cdiv
from flashmemory_vllm.residency.plan import StepPlan
from flashmemory_vllm.residency.planner import StepPlanner
from flashmemory_vllm.residency.types import Geometry, StepInput
from tests.unit.residency.list_twin import LateLists
from tests.unit.residency.memory_twin import MemoryTwin
from tests.unit.residency.row_by_row import RowByRow
from tests.unit.residency.scheduler_twin import Request, SchedulerTwin

IS_THOROUGH = os.environ.get("FLASHMEMORY_HISTORIES") == "thorough"
NUM_HISTORIES = 5_000 if IS_THOROUGH else 200
MOST_REQUESTS = 24 if IS_THOROUGH else 10
MAX_STEPS = 3_000


@dataclass(frozen=True)
class World:
    """What is fixed over a history."""

    policy: BudgetPolicy
    num_groups: int
    tau: int
    max_prefetches: int
    opening_steps: int
    chooses: ChoicePolicy
    fallback_share: float | None
    extra_slots: int
    extra_blocks: int
    num_families: int
    arrival_rate: float
    num_requests: int
    seed: int


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Small memories, so that everything that can run short does."""
    block_size = draw(st.sampled_from([2, 1, 4]))
    policy = BudgetPolicy(
        block_size=block_size,
        resident_ratio=draw(st.sampled_from([0.135, 0.1, 0.2, 0.3, 0.5, 0.9, 1.0])),
        min_sparse_tokens=draw(st.sampled_from([0, 3, 11, 30])) * block_size + draw(st.sampled_from([0, 1])),
        sink_tokens=draw(st.sampled_from([1, 0, 3])),
        recent_tokens=draw(st.sampled_from([3, 0, 9])),
        max_num_batched_tokens=draw(st.sampled_from([9, 3, 20, 64])),
        max_model_len=draw(st.sampled_from([30, 7, 60, 100])) * block_size - draw(st.sampled_from([0, 1])),
        growth_reserve_tokens=draw(st.sampled_from([5, 0, 40])),
        mode=draw(st.sampled_from(["always", "pressure"])),
    )
    return World(
        policy=policy,
        num_groups=draw(st.sampled_from([2, 1, 3])),
        tau=draw(st.sampled_from([4, 1, 2, 9])),
        max_prefetches=draw(st.sampled_from([2, 1, 5, 1000])),
        fallback_share=draw(st.sampled_from([None, 0.1, 0.5])),
        opening_steps=draw(st.sampled_from([0, 1, 4])),
        chooses=draw(st.sampled_from([ChoicePolicy(), ChoicePolicy("sum", 0.5, 1.0), ChoicePolicy(threshold=3.0)])),
        extra_slots=draw(st.sampled_from([0, 2, 8, 20, 60])),
        extra_blocks=draw(st.sampled_from([10, 0, 60, 300])),
        num_families=draw(st.sampled_from([2, 1, 5])),
        arrival_rate=draw(st.sampled_from([0.3, 0.03])),
        num_requests=draw(st.sampled_from([6, 1, 3, MOST_REQUESTS])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


class History:
    """One run of a world until every request has ended."""

    def __init__(self, world: World) -> None:
        self.policy = world.policy
        self.random = Random(world.seed)
        num_slots = world.policy.worst_case() + 1 + world.extra_slots
        num_blocks = cdiv(world.policy.max_model_len, world.policy.block_size) + 1 + world.extra_blocks
        geometry = Geometry(num_blocks, num_slots, world.num_groups, world.policy.block_size)
        self.geometry = geometry
        self.planner = StepPlanner(
            geometry,
            world.policy,
            world.tau,
            world.max_prefetches,
            world.fallback_share,
            world.opening_steps,
        )
        self.lists = LateLists(self.planner, world.chooses, world.seed)
        self.row_by_row = RowByRow(self.planner, world.tau, world.opening_steps, world.max_prefetches)
        self.max_prefetches = world.max_prefetches
        self.scheduler = SchedulerTwin(world.policy, num_blocks, num_slots, self.random)
        self.memory = MemoryTwin(geometry, self.scheduler.ledger.policy_of)
        self.requests = {f"r{uid}": self._request(uid, world) for uid in range(world.num_requests)}
        self.arrival_rate = world.arrival_rate
        self.arriving = list(self.requests.values())
        self.num_fetching: dict[int, int] = {}

    def run(self) -> None:
        """Step until idle; every plan is executed and every invariant checked."""
        for _ in range(MAX_STEPS):
            while self.arriving and self.random.random() < self.arrival_rate:
                self.scheduler.waiting.append(self.arriving.pop())
            if self.scheduler.is_idle and not self.arriving:
                break
            self._step()
        else:
            raise AssertionError(f"{len(self.scheduler.waiting)} requests wait for ever")
        usage = self.planner.usage()
        assert (usage.num_requests, usage.slots_pinned, self.scheduler.ledger.reserved) == (0, 0, 0)

    def _step(self) -> None:
        step = self.scheduler.schedule()
        plan = self.planner.plan(step, self.lists.take(step.step))
        self.planner.check_integrity()
        self.row_by_row.check(step, plan)
        self._check_reserves()
        # One block a row in any case
        most = max(self.max_prefetches, self.num_fetching.get(step.step - STEPS_TO_FORCE, 0))
        assert all(copies.blocks.size <= most for copies in plan.prefetches)
        self.num_fetching[step.step] = sum(asked.cap > 0 and not asked.at_once for asked in plan.asked)
        self.memory.execute(plan, self.planner, self.requests)
        self.planner.complete(plan)
        self.planner.check_integrity()
        if self.random.random() < 0.1:
            self._check_nothing_lost()
        self._check_asked(plan, step)
        self.lists.note(plan)
        self.lists.check()
        self.scheduler.step_done(step)
        self.scheduler.ledger.check_integrity()
        if self.scheduler.running and self.random.random() < 0.01:
            self.scheduler.finish(self.random.choice(self.scheduler.running))

    def _check_reserves(self) -> None:
        usage = self.planner.usage()
        extras = sum(state.extra_blocks for state in self.planner.requests)
        assert usage.slots_pinned <= self.scheduler.ledger.reserved + extras
        assert self.scheduler.ledger.reserved <= usage.num_slots

    def _check_nothing_lost(self) -> None:
        """Every block that a later request may hit is on the host."""
        block_size = self.geometry.block_size
        for key, block in self.scheduler.pool.cached_blocks():
            last = np.int64(key)
            self.memory.check_host(block, self._tags_up_to(int(last), block_size))

    def _tags_up_to(self, last_tag: int, count: int) -> np.ndarray:
        source, position = divmod(last_tag, 10**6)
        positions = np.arange(position - count + 1, position + 1)
        if source < 1000:
            return source * 10**6 + positions
        return self.requests[f"r{source - 1000}"].tags(position - count + 1, position + 1)

    def _check_asked(self, plan: StepPlan, step: StepInput) -> None:
        for asked in plan.asked:
            request = self.requests[asked.req_id]
            assert asked.req_id in step.num_scheduled_tokens
            assert asked.num_tokens == request.num_computed
            num_full = request.num_computed // self.geometry.block_size
            assert asked.num_full == num_full
            assert plan.asked.block_ids[asked.place, :num_full].tolist() == request.block_ids[:num_full]
            assert not self.scheduler.ledger.policy_of(asked.req_id).keeps_all(request.num_computed + asked.is_new)

    def _request(self, uid: int, world: World) -> Request:
        num_tokens = self.random.randint(2, self.policy.max_model_len)
        num_prompt = self.random.randint(1, num_tokens - 1)
        return Request(
            req_id=f"r{uid}",
            uid=uid,
            family=self.random.randrange(world.num_families),
            num_shared=self.random.choice([0, num_prompt // 2, num_prompt, num_tokens]),
            num_prompt=num_prompt,
            num_outputs=num_tokens - num_prompt,
        )


@pytest.mark.timeout(4 * 3600 if IS_THOROUGH else 600)
@settings(
    max_examples=NUM_HISTORIES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=not IS_THOROUGH,
)
@given(worlds())
def test_every_read_finds_what_was_written(world: World) -> None:
    history = History(world)
    history.run()
    counters = history.planner.counters
    note(f"{history.scheduler.num_preemptions} preemptions, {counters}")
    # One that comes when its request is gone counts in neither
    assert sum(counters.selection_latency_seconds.read().counts) == counters.selections
