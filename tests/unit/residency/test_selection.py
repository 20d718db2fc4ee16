"""Resident sets of decode rows: when they are chosen, how they change, and who gives way to whom."""

from __future__ import annotations

import numpy as np
import pytest
from flashmemory_kernels.choose_sets import ChoicePolicy

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.types import NewRequest
from tests.unit.residency.driver import BLOCK, Driver, positions


def test_first_selection_is_due_at_the_end_of_prefill_and_recalled_at_once() -> None:
    driver = Driver(num_slots=14)
    driver.step([NewRequest("a", tuple(range(1, 15)), 0, 48)], a=44)
    asked = driver.step(a=4).asked
    assert [(one.req_id, one.is_new, one.num_full) for one in asked] == [("a", True, 12)]
    assert asked.blocks_of(0).tolist() == list(range(1, 13))
    driver.prefill("b", 12, first_block=100)  # takes all slots but that of the block written last
    driver.offer("a", 12, best=[4])
    plan = driver.step(a=1, finished=["b"])
    # 13 blocks, a quarter of them: the sink, the best one, and the tail.
    assert positions(plan, "a") == [0, 4, 12]
    assert plan.rows["a"].evicted_tokens == (10 * BLOCK,)
    assert plan.recalls[0].blocks.tolist() == [1, 5]
    assert plan.prefetches == ()
    assert driver.planner.counters.missing_selections == 0


def test_without_a_selection_the_newest_resident_blocks_are_taken() -> None:
    driver = Driver()
    driver.prefill("a", 12)
    plan = driver.step(a=1)
    assert positions(plan, "a") == [0, 11, 12]
    assert plan.recalls == ()
    assert driver.planner.counters.missing_selections == 1


def test_later_selections_are_in_force_with_the_step_that_fetches_their_blocks() -> None:
    driver = Driver(num_slots=28, ratio=0.4)  # five blocks of thirteen
    driver.prefill("a", 12)
    driver.offer("a", 12, best=[3, 5, 7])
    assert positions(driver.step(a=1), "a") == [0, 3, 5, 7, 12]
    driver.prefill("b", 22, first_block=100, spare_blocks=0)
    driver.offer("a", 12, best=[9, 5, 10, 3])
    plan = driver.step(a=1, finished=["b"])
    assert plan.prefetches[0].blocks.tolist() == [10, 11]
    assert plan.recalls == ()
    assert positions(plan, "a") == [0, 5, 9, 10, 12]
    assert driver.step(a=1).prefetches == ()
    assert driver.planner.counters.prefetched_blocks == 2


def test_selections_of_the_opening_are_recalled_at_once() -> None:
    driver = Driver(num_slots=28, ratio=0.4, opening_steps=1)  # five blocks of thirteen
    driver.prefill("a", 12)
    driver.offer("a", 12, best=[3, 5, 7])
    asked = driver.step([NewRequest("b", tuple(range(100, 122)), 0, 88)], a=1, b=88).asked[0]
    assert (asked.req_id, asked.is_new, asked.at_once) == ("a", False, True)
    driver.offer("a", 12, best=[9, 5, 10, 3])
    plan = driver.step(a=1, finished=["b"])
    assert plan.recalls[0].blocks.tolist() == [10, 11]
    assert plan.prefetches == ()
    assert positions(plan, "a") == [0, 5, 9, 10, 12]
    driver.prefill("c", 22, first_block=130, spare_blocks=0)
    driver.offer("a", 12, best=[4, 9, 10])
    plan = driver.step(a=1, finished=["c"])
    # The opening is over
    assert plan.recalls == ()
    assert plan.prefetches[0].blocks.tolist() == [5]


def test_resident_blocks_of_a_new_selection_join_at_once() -> None:
    driver = Driver()
    driver.prefill("a", 12)
    driver.step(a=1)
    driver.offer("a", 12, best=[6])
    plan = driver.step(a=1)
    assert positions(plan, "a") == [0, 6, 12]
    assert plan.prefetches == plan.recalls == ()


def test_blocks_that_must_wait_leave_old_ones_in_the_set() -> None:
    driver = Driver(num_slots=14, ratio=0.4, max_prefetches=1)
    driver.prefill("a", 12)
    driver.offer("a", 12, best=[3, 5, 7])
    driver.step(a=1)
    driver.prefill("b", 8, first_block=100, spare_blocks=0)  # all 13 slots are taken, 5 by a and 8 by b
    driver.offer("a", 12, best=[9, 10, 11, 3])
    plan = driver.step(a=1)
    # 9 takes the slot of 7, the worst that was chosen before
    assert (plan.prefetches[0].blocks.tolist(), plan.evicted) == ([10], 1)
    assert positions(plan, "a") == [0, 3, 5, 9, 12]
    plan = driver.step(a=1)
    assert plan.prefetches[0].blocks.tolist() == [11]
    assert positions(plan, "a") == [0, 3, 9, 10, 12]


def test_blocks_that_come_in_are_read_by_others_in_the_same_step() -> None:
    driver = Driver(num_slots=40)
    driver.prefill("a", 12)
    driver.step(a=1)
    # Takes the slots of all blocks of a but the three in its set: the first and the last two.
    driver.prefill("b", 36, first_block=100, spare_blocks=0)
    driver.offer("a", 12, best=[1])
    plan = driver.step([NewRequest("c", (1, 2, 60), 8, 48)], finished=["b"], a=1, c=4)
    assert plan.prefetches[0].blocks.tolist() == [2]
    assert positions(plan, "c") == [0, 1, 2]
    assert plan.rows["c"].streamed[0].tolist() == []


def test_dense_prefill_leaves_room_for_prefetches() -> None:
    driver = Driver(num_slots=16, min_sparse=40)
    driver.prefill("d", 8, first_block=50, spare_blocks=0)
    driver.step(finished=["d"])
    driver.prefill("a", 12)
    driver.step(a=1)
    driver.prefill("b", 12, first_block=100, spare_blocks=0)
    driver.offer("a", 12, best=[1])
    # Of 15 slots a holds two and prefetches one, e writes four and c one: seven are left for eight of history.
    new = [NewRequest("c", (*range(50, 58), 70), 32, 34), NewRequest("e", (80, 81, 82, 83), 0, 16)]
    plan = driver.step(new, finished=["b"], a=1, c=2, e=16)
    assert plan.prefetches[0].blocks.tolist() == [2]
    assert (positions(plan, "c"), plan.rows["c"].streamed[0].size) == ([8], 8)


def test_growth_drops_the_lowest_scored_block() -> None:
    driver = Driver(ratio=0.4)
    driver.prefill("a", 12)
    driver.offer("a", 12, best=[3, 5, 7])
    assert positions(driver.step(a=4), "a") == [0, 3, 5, 7, 12]
    # Block 12 has left the recent window; unscored, it ranks above all scored ones. Who goes is known a step later.
    for expected in ([0, 3, 5, 7, 12, 13], [0, 3, 5, 12, 13]):
        plan = driver.step(a=1)
        assert positions(plan, "a") == expected
        assert plan.recalls == plan.prefetches == ()


def test_growth_keeps_recent_blocks_however_they_scored() -> None:
    driver = Driver(ratio=0.5, recent=3 * BLOCK)
    driver.prefill("a", 23)
    chosen = list(range(5, 13))
    driver.offer("a", 23, best=chosen)  # the newest blocks score lowest
    assert positions(driver.step(a=4), "a") == [0, *chosen, 21, 22, 23]
    assert positions(driver.step(a=1), "a") == [0, *chosen, 21, 22, 23, 24]
    assert positions(driver.step(a=1), "a") == [0, *chosen, 22, 23, 24]


def test_rows_are_those_of_the_last_plan_only() -> None:
    driver = Driver()
    driver.prefill("a", 12)
    earlier = driver.step(a=1)
    assert earlier.rows["a"].slots[0].size == 3
    driver.step(a=1)
    with pytest.raises(IntegrityError, match="the rows of plan 1 are asked for, but plan 2 was made"):
        earlier.rows["a"].slots  # noqa: B018 - reading is what is refused


def test_turning_sparse_is_announced_one_step_ahead() -> None:
    driver = Driver(min_sparse=30)
    assert not driver.prefill("a", 7).asked
    (asked,) = driver.step(a=1).asked
    assert (asked.is_new, asked.num_full) == (True, 7)
    driver.offer("a", 7, best=[2])
    plan = driver.step(a=1)
    assert positions(plan, "a") == [0, 2, 7]
    assert driver.planner.counters.missing_selections == 0


def test_groups_choose_on_their_own() -> None:
    driver = Driver(num_groups=2)
    driver.prefill("a", 12)
    scores = np.zeros((2, 12), np.float32)
    scores[0, 3] = scores[1, 8] = 1.0
    driver.lists.offer("a", scores)
    plan = driver.step(a=1)
    assert positions(plan, "a", 0) == [0, 3, 12]
    assert positions(plan, "a", 1) == [0, 8, 12]


def test_after_a_selection_that_failed_the_set_in_force_stays() -> None:
    driver = Driver(tau=2)
    driver.prefill("a", 12)
    driver.offer("a", 12, best=[3])
    assert positions(driver.step(a=1), "a") == [0, 3, 12]
    assert positions(driver.step(a=1), "a") == [0, 3, 12]
    driver.offer("a", 12, best=[7])
    driver.step(a=1)
    assert positions(driver.step(a=1), "a") == [0, 7, 12]


def test_a_request_whose_first_selection_failed_decodes_with_what_has_a_slot() -> None:
    driver = Driver()
    driver.prefill("a", 12)
    assert positions(driver.step(a=1), "a") == [0, 11, 12]
    assert driver.planner.counters.missing_selections == 1


def test_blocks_below_the_threshold_get_no_slot_though_there_is_room() -> None:
    driver = Driver(num_slots=28, ratio=0.4, chooses=ChoicePolicy(threshold=1999.0))  # five blocks of thirteen
    driver.prefill("a", 12)
    driver.offer("a", 12, best=[3, 5, 7])  # worth 2000, 1999 and 1998
    assert positions(driver.step(a=1), "a") == [0, 3, 5, 12]


def test_a_decode_step_that_writes_more_than_the_budget_is_refused() -> None:
    driver = Driver()
    driver.prefill("a", 12)
    with pytest.raises(IntegrityError, match="a decode step of 16 tokens"):
        driver.step(a=16)
