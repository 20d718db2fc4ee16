"""Requests in the step planner: prefill, prefix hits, sharing, their end, and steps that contradict it."""

from __future__ import annotations

import pytest

from flashmemory_vllm.errors import ConfigError, IntegrityError
from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.residency.planner import StepPlanner
from flashmemory_vllm.residency.types import NewRequest, Phase, RunningRequest, StepInput
from tests.unit.residency.driver import BLOCK, Driver, positions


def test_a_prompt_is_written_back_as_its_blocks_fill() -> None:
    driver = Driver()
    plan = driver.step([NewRequest("a", (5, 6, 7), 0, 11)], a=6)
    assert plan.fresh[0].blocks.tolist() == [5, 6]
    assert plan.write_backs.blocks.tolist() == [5]
    assert not plan.asked
    plan = driver.step(a=5)
    row = plan.rows["a"]
    assert (row.phase, row.num_computed_tokens, row.num_tokens) == (Phase.PREFILL, 6, 5)
    assert plan.write_backs.blocks.tolist() == [6]
    assert plan.write_backs.slots.tolist() == [[driver.planner.lut[0, 6]]]
    assert positions(plan, "a") == [0, 1, 2]
    assert row.evicted_tokens == (0,)


def test_long_prefill_streams_what_is_not_resident() -> None:
    driver = Driver(num_slots=9)
    blocks = tuple(range(1, 13))
    driver.step([NewRequest("a", blocks, 0, 48)], a=20)
    plan = driver.step(a=20)
    row = plan.rows["a"]
    assert positions(plan, "a") == [5, 6, 7, 8, 9]
    assert row.streamed[0].tolist() == [1, 2, 3, 4, 5]
    assert row.evicted_tokens == (20,)
    assert plan.evicted == 2
    assert driver.planner.counters.streamed_blocks == 5


def test_dense_prefill_recalls_its_history_instead() -> None:
    driver = Driver(num_slots=20, ratio=1.0)
    driver.prefill("a", 8, spare_blocks=0)
    driver.step(finished=["a"])
    driver.prefill("b", 19, first_block=50, spare_blocks=0)
    driver.step(finished=["b"])
    plan = driver.step([NewRequest("c", tuple(range(1, 10)), 32, 34)], c=2)
    assert plan.recalls[0].blocks.tolist() == list(range(1, 9))
    assert positions(plan, "c") == list(range(9))
    assert plan.rows["c"].streamed[0].size == 0


def test_dense_prefill_streams_when_slots_are_short() -> None:
    driver = Driver(num_slots=10, ratio=1.0)
    driver.prefill("a", 8, spare_blocks=0)
    driver.step(finished=["a"])
    driver.prefill("b", 9, first_block=50, spare_blocks=0)
    driver.step(finished=["b"])
    driver.prefill("d", 3, first_block=70, spare_blocks=0)
    plan = driver.step([NewRequest("c", tuple(range(1, 10)), 32, 34)], c=2)
    assert positions(plan, "c") == [8]
    assert plan.rows["c"].streamed[0].tolist() == list(range(1, 9))


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_a_prefix_hit_on_blocks_written_in_the_same_step_reads_them_from_slots(ratio: float) -> None:
    driver = Driver(num_slots=8, ratio=ratio)
    first = NewRequest("a", (1, 2, 3), 0, 12)
    second = NewRequest("b", (1, 2, 4), 8, 12)
    plan = driver.step([second, first], b=4, a=12)
    assert positions(plan, "b") == [0, 1, 2]
    assert plan.rows["b"].slots[0].tolist() == driver.planner.lut[0, [1, 2, 4]].tolist()
    assert plan.rows["b"].streamed[0].size == 0
    assert sorted(plan.write_backs.blocks) == [1, 2, 3, 4]


def test_mixed_history_streams_the_host_part_only() -> None:
    driver = Driver(num_slots=8)
    driver.prefill("a", 3, spare_blocks=0)
    driver.step(finished=["a"])
    driver.prefill("b", 7, first_block=50, spare_blocks=0)
    driver.step(finished=["b"])
    first = NewRequest("c", (1, 2, 3, 4, 5), 12, 20)
    second = NewRequest("d", (1, 2, 3, 4, 6), 16, 20)
    plan = driver.step([first, second], c=8, d=4)
    assert positions(plan, "d") == [3, 4]
    assert plan.rows["d"].streamed[0].tolist() == [1, 2, 3]


def test_a_finished_request_leaves_its_full_blocks_as_cache() -> None:
    driver = Driver()
    driver.step([NewRequest("a", (1, 2, 3), 0, 10)], a=10)
    driver.step(finished=["a", "never seen"])
    usage = driver.planner.usage()
    assert (usage.num_requests, usage.slots_used, usage.slots_pinned, usage.host_blocks) == (0, 2, 0, 2)
    plan = driver.step([NewRequest("b", (1, 2, 9), 8, 10)], b=2)
    assert plan.recalls == ()
    assert positions(plan, "b") == [0, 1, 2]


def test_a_block_given_to_other_tokens_loses_its_old_content() -> None:
    driver = Driver()
    driver.prefill("a", 3, spare_blocks=0)
    driver.step(finished=["a"])
    driver.step([NewRequest("b", (2, 3), 0, 5)], b=5)
    assert driver.planner.usage().host_blocks == 2
    with pytest.raises(IntegrityError, match="neither a slot nor a valid host copy"):
        driver.step([NewRequest("c", (1, 3, 7), 8, 9)], finished=["b"], c=1)


def test_a_preempted_request_resumes_on_its_cached_blocks() -> None:
    driver = Driver()
    driver.prefill("a", 5)
    driver.step(a=3)
    driver.step(preempted=["a"])
    plan = driver.step([NewRequest("a", (1, 2, 3, 4, 5, 30), 20, 23)], a=3)
    assert plan.rows["a"].phase is Phase.PREFILL
    assert positions(plan, "a") == [0, 1, 2, 3, 4, 5]


def test_a_list_that_meets_its_request_in_prefill_again_is_ignored() -> None:
    driver = Driver()
    (asked,) = driver.prefill("a", 5).asked
    again = NewRequest("a", (1, 2, 3, 4, 5, 30), 8, 21)
    driver.step([again], preempted=["a"], a=4)
    assert asked.is_new
    (state,) = driver.planner.requests
    assert state.first_set is None
    assert driver.planner.counters.selections == 0
    driver.step(a=9)
    assert positions(driver.step(a=1), "a") == [0, 4, 5]


def test_a_known_request_that_is_new_again_starts_over() -> None:
    driver = Driver()
    driver.prefill("a", 5)
    driver.step(a=3)
    # Its old blocks are its own again, in another place, and those of another request.
    again, other = NewRequest("a", (1, 2, 5, 6), 8, 15), NewRequest("b", (3, 4), 0, 7)
    plan = driver.step([other, again], a=7, b=7)
    assert positions(plan, "a") == [0, 1, 2, 3]
    assert plan.write_backs.blocks.tolist() == [5, 3]


def test_blocks_shared_with_a_running_request_are_not_evicted() -> None:
    driver = Driver(num_slots=10)
    driver.prefill("a", 4)
    driver.step([NewRequest("b", (1, 2, 3, 4, 20), 16, 17)], a=1, b=1)
    driver.step(finished=["b"])
    driver.prefill("c", 6, first_block=50, spare_blocks=0)
    assert (driver.planner.lut[0, [1, 4, 5]] > 0).all()


def test_what_one_request_returns_another_may_use_in_the_same_step() -> None:
    driver = Driver(num_slots=13)
    driver.prefill("a", 12)
    driver.offer("a", 12, best=[2])
    new = NewRequest("b", tuple(range(50, 59)), 0, 36)
    plan = driver.step([new], b=36, a=1)
    assert plan.evicted == 10
    assert positions(plan, "a") == [0, 2, 12]


def test_reset_forgets_everything() -> None:
    driver = Driver()
    driver.prefill("a", 12)
    lut = driver.planner.lut
    driver.planner.reset()
    driver.planner.check_integrity()
    assert (lut[0, 1:] == -1).all()
    assert driver.planner.usage().host_blocks == 0
    with pytest.raises(IntegrityError, match="not known"):
        driver.step(a=1)


def test_contradictions_are_refused() -> None:
    driver = Driver()
    driver.prefill("a", 3, spare_blocks=0)
    planner = driver.planner

    def step(*new: NewRequest, running: tuple[RunningRequest, ...] = (), **num_tokens: int) -> StepInput:
        return StepInput(9, (), (), new, running, num_tokens)

    with pytest.raises(IntegrityError, match="begins at token 11, the last one ended at 12"):
        planner.plan(step(running=(RunningRequest("a", (9,), 11),), a=1))
    with pytest.raises(IntegrityError, match="prefix hit of 3 tokens"):
        planner.plan(step(NewRequest("b", (9,), 3, 4), b=1))
    with pytest.raises(IntegrityError, match="blocks 0 to 9 are given"):
        planner.plan(step(NewRequest("c", (9, 0), 0, 4), c=1))
    with pytest.raises(ConfigError, match="tau"):
        StepPlanner(planner.geometry, BudgetPolicy(BLOCK, 1.0, 0, 0, 0, 1, 1, 0), 0)


def test_tokens_without_blocks_are_refused() -> None:
    driver = Driver()
    driver.prefill("a", 3, spare_blocks=0)
    with pytest.raises(IntegrityError, match=r"12 \+ 1 tokens do not fit its 3 blocks"):
        driver.step(a=1)


def test_plans_complete_in_order() -> None:
    driver = Driver()
    empty = StepInput(1, (), (), (), (), {})
    first = driver.planner.plan(empty)
    with pytest.raises(IntegrityError, match="while step 1 is not complete"):
        driver.planner.plan(empty)
    driver.planner.complete(first)
    with pytest.raises(IntegrityError, match="open plan is none"):
        driver.planner.complete(first)
