"""Histories at the limits: the shortest prompts, those that end with a block or a token after it, and no room to spare.

Each is run as the random histories are: every read of a memory of tags, every invariant, every step.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from flashmemory_kernels.choose_sets import ChoicePolicy

from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.residency.types import Phase
from tests.unit.residency.driver import Driver, positions
from tests.unit.residency.scheduler_twin import Request
from tests.unit.residency.test_histories import History, World

BLOCK = 4
POLICY = BudgetPolicy(
    block_size=BLOCK,
    resident_ratio=0.2,
    min_sparse_tokens=0,
    sink_tokens=BLOCK,
    recent_tokens=2 * BLOCK,
    max_num_batched_tokens=3 * BLOCK,
    max_model_len=30 * BLOCK,
    growth_reserve_tokens=0,
)
WORLD = World(
    policy=POLICY,
    num_groups=2,
    tau=3,
    max_prefetches=2,
    chooses=ChoicePolicy(),
    opening_steps=0,
    fallback_share=None,
    extra_slots=0,
    extra_blocks=40,
    num_families=1,
    arrival_rate=1.0,
    num_requests=4,
    seed=1,
)
# One token, a token before and after the end of a block, and the end of one, the first, some and the last.
PROMPTS = {
    "one token": 1,
    "one block": BLOCK,
    "one block and a token": BLOCK + 1,
    "a token short of two blocks": 2 * BLOCK - 1,
    "as many blocks as a step computes": 3 * BLOCK,
    "a step's blocks and a token": 3 * BLOCK + 1,
    "many blocks": 20 * BLOCK,
    "many blocks and a token": 20 * BLOCK + 1,
    "all but the last token": 30 * BLOCK - 1,
}


class EqualRequests(History):
    """Requests with prompts of one length, each of which begins as the others do; the last ones sample to the end."""

    def __init__(self, world: World, num_prompt: int) -> None:
        self._num_prompt = num_prompt
        super().__init__(world)

    def _request(self, uid: int, world: World) -> Request:
        most = world.policy.max_model_len - self._num_prompt
        num_outputs = most if uid >= 2 else min(most, 1 + uid * BLOCK)
        return Request(f"r{uid}", uid, 0, self._num_prompt // 2, self._num_prompt, num_outputs)


@pytest.mark.parametrize("tau", [1, 3])
@pytest.mark.parametrize("extra_slots", [0, 1])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_lengths_and_slots_without_room_to_spare(prompt: str, extra_slots: int, tau: int) -> None:
    world = replace(WORLD, extra_slots=extra_slots, tau=tau)
    history = EqualRequests(world, PROMPTS[prompt])
    history.run()
    assert history.planner.counters.decode_rows > 0


@pytest.mark.parametrize("tau", [1, 3])
@pytest.mark.parametrize("prompt", ["one block and a token", "many blocks", "many blocks and a token"])
def test_only_sink_and_recent_are_left(prompt: str, tau: int) -> None:
    """A ratio that is too small for any block between them."""
    policy = replace(POLICY, resident_ratio=0.01)
    history = EqualRequests(replace(WORLD, policy=policy, tau=tau), PROMPTS[prompt])
    history.run()
    counted = history.planner.counters
    rows = counted.decode_rows * WORLD.num_groups
    assert counted.decode_resident_blocks <= rows * policy.most_held(policy.max_model_len)
    assert policy.decode_budget(policy.max_model_len) == policy.sink_blocks(BLOCK) + 2


def test_a_selection_after_every_step_is_in_force_in_the_next() -> None:
    driver = Driver(ratio=0.4, tau=1)
    plan = driver.prefill("a", 12)
    for chosen in ([3, 5], [9, 5], [3, 9]):
        assert [asked.req_id for asked in plan.asked] == ["a"]
        driver.offer("a", 12, chosen)
        plan = driver.step(a=1)
        assert plan.rows["a"].phase is Phase.DECODE
    driver.step(a=1)
    assert {3, 9} <= set(positions(driver.step(a=1), "a"))


@pytest.mark.parametrize("num_requests", [8, 9])
def test_as_many_requests_as_fit_and_one_more(num_requests: int) -> None:
    """Each reserves its worst case, and there are slots for eight."""
    world = replace(WORLD, extra_slots=7 * POLICY.worst_case(), num_requests=num_requests, extra_blocks=300)
    history = EqualRequests(world, 20 * BLOCK + 1)
    most_at_once = 0
    step = history.scheduler.schedule

    def schedule() -> object:
        nonlocal most_at_once
        scheduled = step()
        most_at_once = max(most_at_once, len(history.scheduler.running))
        return scheduled

    history.scheduler.schedule = schedule  # type: ignore[method-assign, assignment]
    history.run()
    assert most_at_once >= 8
