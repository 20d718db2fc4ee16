"""Later selections come in by portions: a fixed number of blocks a step, shared by those that wait, the best first."""

from __future__ import annotations

import pytest

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.residency.plan import StepPlan
from flashmemory_vllm.residency.types import NewRequest
from tests.unit.residency.driver import Driver, positions


def decoding(max_prefetches: int, num_groups: int = 1) -> Driver:
    """One request with 12 full blocks that decodes with the best of 3, 5 and 7; nothing else has a slot."""
    driver = Driver(num_slots=40, num_groups=num_groups, ratio=0.4, tau=50, max_prefetches=max_prefetches)
    driver.prefill("a", 12)
    driver.offer("a", 12, best=[3, 5, 7])
    assert positions(driver.step(a=1), "a") == [0, 3, 5, 7, 12]
    fill_cache(driver)
    return driver


def fill_cache(driver: Driver) -> None:
    """Take every slot that no request holds, and give it back as cache."""
    num_slots = driver.planner.usage().num_slots - driver.planner.usage().slots_pinned
    driver.prefill("filler", num_slots, first_block=100, spare_blocks=0)
    driver.step(finished=["filler"])


def prefetched(plan: StepPlan, group: int = 0) -> list[int]:
    return sorted(int(block) for copies in plan.prefetches if copies.group == group for block in copies.blocks)


def test_blocks_come_in_portions_and_old_ones_fill_in() -> None:
    driver = decoding(max_prefetches=1)
    driver.offer("a", 12, best=[9, 10, 3])
    plan = driver.step(a=1)
    # 9 comes with this very step. One is missing: of the old ones the better one stays.
    assert (prefetched(plan), positions(plan, "a")) == ([10], [0, 3, 5, 9, 12])
    plan = driver.step(a=1)
    assert (prefetched(plan), positions(plan, "a")) == ([11], [0, 3, 9, 10, 12])
    plan = driver.step(a=1)
    assert (prefetched(plan), positions(plan, "a")) == ([], [0, 3, 9, 10, 12])
    assert driver.planner.counters.prefetched_blocks == 2


def test_what_is_recalled_for_a_first_selection_is_not_limited() -> None:
    driver = Driver(num_slots=14, ratio=0.4, max_prefetches=1)
    driver.step([NewRequest("a", tuple(range(1, 15)), 0, 48)], a=44)
    driver.step(a=4)
    driver.prefill("b", 12, first_block=100, spare_blocks=0)
    driver.offer("a", 12, best=[3, 5, 7])
    plan = driver.step(a=1, finished=["b"])
    assert plan.recalls[0].blocks.tolist() == [1, 4, 6, 8]
    assert plan.prefetches == ()


def test_blocks_that_another_request_brought_are_not_copied_but_take_their_turn() -> None:
    driver = decoding(max_prefetches=1)
    driver.step([NewRequest("b", (*range(1, 12), 60, 61), 44, 48)], a=1, b=4)
    driver.offer("b", 12, best=[9, 10, 8])
    driver.step(a=1, b=1)
    driver.offer("a", 12, best=[9, 2, 1])
    plan = driver.step(a=1, b=1)
    assert (prefetched(plan), positions(plan, "a")) == ([], [0, 3, 5, 9, 12])


def test_a_new_selection_replaces_what_still_waits() -> None:
    driver = decoding(max_prefetches=1)
    driver.offer("a", 12, best=[9, 10, 2])
    driver.step(a=1)
    driver.offer("a", 12, best=[8, 9, 3])
    plan = driver.step(a=1)
    # 9 and 3 are there: only 8 is missing, and nobody waits for 10 and 2 any more.
    assert (prefetched(plan), positions(plan, "a")) == ([9], [0, 3, 8, 9, 12])
    assert positions(driver.step(a=1), "a") == [0, 3, 8, 9, 12]
    assert driver.step(a=1).prefetches == ()


def test_growth_gives_up_the_worst_even_if_it_only_waits() -> None:
    driver = decoding(max_prefetches=1)
    driver.offer("a", 12, best=[9, 10, 2])
    driver.step(a=1)
    # Blocks 12 and 13 are written; the list that came with the second does not know of it.
    plan = driver.step(a=3)
    assert (prefetched(plan), positions(plan, "a")) == ([11], [0, 3, 9, 10, 12, 13])
    # There is room for two more: 2 is the worst of 9, 10 and 2.
    for _ in range(2):
        plan = driver.step(a=1)
        assert (plan.prefetches, positions(plan, "a")) == ((), [0, 9, 10, 12, 13])


def test_those_that_may_fetch_share_what_may_come() -> None:
    driver = Driver(num_slots=60, ratio=0.4, tau=50, max_prefetches=3)
    for name, first_block in (("a", 1), ("b", 20)):
        driver.prefill(name, 12, first_block=first_block)
        driver.offer(name, 12, best=[3, 5, 7])
        driver.step(tokens={name: 1})
    fill_cache(driver)
    driver.offer("b", 12, best=[9, 10, 2, 11])
    assert prefetched(driver.step(b=1)) == [22, 29, 30]
    driver.offer("b", 12, best=[4, 6])
    driver.offer("a", 12, best=[9, 10, 2])
    assert prefetched(driver.step(a=1, b=1)) == [10, 24]
    assert prefetched(driver.step(a=1, b=1)) == [11, 26]
    assert prefetched(driver.step(a=1, b=1)) == [3, 21]
    assert prefetched(driver.step(a=1, b=1)) == []


def test_a_request_that_pauses_gets_what_was_chosen_for_it_and_asks_when_it_goes_on() -> None:
    driver = decoding(max_prefetches=1)
    driver.offer("a", 12, best=[9, 10, 2])
    driver.step(a=1)
    assert prefetched(driver.step()) == [11]
    assert driver.step().prefetches == ()
    assert positions(driver.step(a=1), "a") == [0, 3, 9, 10, 12]
    assert prefetched(driver.step(a=1)) == [3]


def test_each_group_has_its_own_limit() -> None:
    driver = decoding(max_prefetches=1, num_groups=2)
    driver.offer("a", 12, best=[9, 10, 2])
    plan = driver.step(a=1)
    assert (prefetched(plan, 0), prefetched(plan, 1)) == ([10], [10])


def test_a_request_that_ends_gives_up_its_wishes() -> None:
    driver = decoding(max_prefetches=1)
    driver.offer("a", 12, best=[9, 10, 2])
    driver.step(a=1)
    plan = driver.step(finished=["a"])
    assert plan.prefetches == ()
    assert driver.planner.usage().slots_pinned == 0


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_prefetches: 0 is given, at least 1 is allowed"):
        Driver(max_prefetches=0)
