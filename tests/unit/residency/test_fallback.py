"""A request whose scores spread keeps all blocks while no budget needs the slots, and gives them up at once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from flashmemory_kernels.choose_sets import ChoicePolicy

from flashmemory_vllm.residency.requests import RequestState
from flashmemory_vllm.residency.types import NewRequest
from tests.unit.residency.driver import Driver, positions

SPREAD = (3, 5, 7, 9, 10)
ALL = [*range(13)]


def driver_with(
    num_slots: int = 60,
    max_prefetches: int | None = None,
    num_groups: int = 1,
    selections: Sequence[Sequence[int]] = (),
) -> Driver:
    """One request with 12 full blocks that decodes; each selection finds the blocks given worth a slot.

    Ten blocks can be left out, five have a slot. It falls back above a share of 0.4.
    """
    driver = Driver(
        num_slots,
        num_groups,
        50,
        0.4,
        chooses=ChoicePolicy(threshold=1500.0),
        max_prefetches=max_prefetches,
        fallback_share=0.4,
    )
    driver.prefill("a", 12)
    for best in selections:
        driver.offer("a", 12, best)
        driver.step(a=1)
    return driver


def state_of(driver: Driver, req_id: str = "a") -> RequestState:
    state = driver.planner.requests.get(req_id)
    assert state is not None
    return state


def decided(driver: Driver) -> tuple[int, int, int]:
    """Fallbacks granted, refused and revoked."""
    counters = driver.planner.counters
    return counters.fallbacks, counters.refused_fallbacks, counters.revoked_fallbacks


def fill_cache(driver: Driver) -> None:
    """Take every slot that no request holds, and give it back as cache."""
    usage = driver.planner.usage()
    driver.prefill("filler", usage.num_slots - usage.slots_pinned, first_block=100, spare_blocks=0)
    driver.step(finished=["filler"])


def test_a_first_selection_decides_nothing() -> None:
    driver = driver_with(selections=[SPREAD])
    assert not state_of(driver).falls_back
    assert state_of(driver).selected_share == 5 / 11


def test_the_second_selection_above_the_limit_brings_all_blocks() -> None:
    driver = driver_with(selections=[SPREAD])
    driver.offer("a", 12, SPREAD)
    plan = driver.step(a=1)
    assert positions(plan, "a") == ALL
    assert plan.rows["a"].evicted_tokens == (0,)
    assert decided(driver) == (1, 0, 0)


def test_the_share_runs_over_all_selections() -> None:
    driver = driver_with(selections=[(3,), SPREAD])
    assert (state_of(driver).selected_share, decided(driver)) == (6 / 22, (0, 0, 0))
    driver.offer("a", 12, (1, 2, *SPREAD))
    driver.step(a=1)
    assert (state_of(driver).selected_share, decided(driver)) == (13 / 33, (0, 0, 0))
    driver.offer("a", 12, SPREAD)
    driver.step(a=1)
    assert (state_of(driver).selected_share, decided(driver)) == (18 / 44, (1, 0, 0))


def test_it_stays_whatever_later_selections_say() -> None:
    driver = driver_with(selections=[SPREAD, SPREAD, (3,), (3,), (3,)])
    assert state_of(driver).selected_share < 0.4
    assert positions(driver.step(a=1), "a") == [*ALL, 13]
    assert decided(driver) == (1, 0, 0)


def test_blocks_come_in_portions_the_newest_first_and_after_those_of_others() -> None:
    driver = driver_with(max_prefetches=2, selections=[SPREAD])
    driver.prefill("b", 12, first_block=20)
    driver.offer("b", 12, (1, 2))
    driver.step(a=1, b=1)
    fill_cache(driver)
    driver.offer("a", 12, (10, 9, *SPREAD[:3]))
    plan = driver.step(a=1, b=1)
    # What goes for 9 and 10 stays beside the set
    assert plan.prefetches[0].blocks.tolist() == [10, 11]
    assert positions(plan, "a") == [0, 3, 5, 7, 9, 10, 12]
    driver.offer("b", 12, (8, 1))
    plan = driver.step(a=1, b=1)
    # Block 28 is the one that b has waited for; a has waited longer, but for more than its budget.
    assert plan.prefetches[0].blocks.tolist() == [12, 28]
    assert positions(plan, "a") == [0, 3, 5, 7, 9, 10, 11, 12]
    assert driver.step(b=1).prefetches == ()  # who pauses is not brought any
    for _ in range(4):
        plan = driver.step(a=1, b=1)
    assert positions(plan, "a") == [*ALL, 13]


def test_it_goes_on_growing() -> None:
    driver = driver_with(selections=[SPREAD, SPREAD])
    for num_blocks in (14, 15, 16):
        assert positions(driver.step(a=4), "a") == [*range(num_blocks)]
    assert state_of(driver).extra_blocks == 16 - 7


@pytest.mark.parametrize(("num_slots", "fell_back"), [(16, True), (15, False)])
def test_a_tenth_of_all_slots_stays_free(num_slots: int, fell_back: bool) -> None:
    # 13 blocks of 15 slots are 87 %, of 14 they are 93 %.
    driver = driver_with(num_slots, selections=[SPREAD, SPREAD])
    assert state_of(driver).falls_back is fell_back
    assert decided(driver) == ((1, 0, 0) if fell_back else (0, 1, 0))


@pytest.mark.parametrize("is_scheduled", [True, False])
@pytest.mark.parametrize("num_groups", [1, 2])
def test_it_ends_in_the_step_that_needs_its_slots(is_scheduled: bool, num_groups: int) -> None:
    driver = driver_with(16, num_groups=num_groups, selections=[SPREAD, (10, 9, 5, 7, 3)])
    tokens = {"b": 12, "a": 1} if is_scheduled else {"b": 12}
    plan = driver.step([NewRequest("b", (100, 101, 102), 0, 12)], tokens=tokens)
    assert decided(driver) == (1, 0, 1)
    if not is_scheduled:
        plan = driver.step(a=1)
    for group in range(num_groups):
        assert positions(plan, "a", group) == [0, 5, 9, 10, 12]
    assert plan.prefetches == plan.recalls == ()


def test_what_still_waits_competes_for_the_budget() -> None:
    driver = driver_with(16, max_prefetches=1, selections=[SPREAD])
    fill_cache(driver)
    driver.offer("a", 12, (10, 9, 5, 7, 3))
    assert driver.step(a=1).prefetches[0].blocks.tolist() == [11]
    # Of 5, 9 and 10 the fallback has not brought 9, which comes now.
    plan = driver.step([NewRequest("b", (100, 101, 102), 0, 12)], a=1, b=12)
    assert plan.prefetches[0].blocks.tolist() == [10]
    assert positions(plan, "a") == [0, 5, 9, 10, 12]


def test_a_budget_that_fits_ends_nothing() -> None:
    driver = driver_with(16, selections=[SPREAD, SPREAD])
    driver.step([NewRequest("b", (100, 101), 0, 8)], a=1, b=8)
    assert decided(driver) == (1, 0, 0)


def test_the_smaller_share_gives_way_first() -> None:
    driver = driver_with(36, selections=[(*SPREAD, 1), SPREAD])
    driver.prefill("b", 12, first_block=20)
    for _ in range(2):
        driver.offer("b", 12, SPREAD)
        driver.step(a=1, b=1)
    assert state_of(driver).falls_back
    assert state_of(driver, "b").falls_back
    driver.prefill("c", 10, first_block=100, spare_blocks=0)
    assert (state_of(driver).falls_back, state_of(driver, "b").falls_back) == (True, False)
    assert decided(driver) == (2, 0, 1)


def test_it_comes_back_only_when_there_is_more_room_than_it_needed_before() -> None:
    driver = driver_with(17, selections=[SPREAD, SPREAD])
    driver.step([NewRequest("b", (100, 101, 102, 103), 0, 16)], a=1, b=16)
    for finished in ((), ("b",)):
        driver.offer("a", 12, SPREAD)
        driver.step(finished=finished, a=1)
    # 14 of 16 slots would be enough for a first time, but not for a second.
    assert (decided(driver), state_of(driver).falls_back) == ((1, 2, 1), False)
    driver = driver_with(21, selections=[SPREAD, SPREAD])
    driver.prefill("b", 10, first_block=100, spare_blocks=0)
    driver.offer("a", 12, SPREAD)
    driver.step(finished=["b"], a=1)
    # 14 of 20 are.
    assert (decided(driver), state_of(driver).falls_back) == ((2, 0, 1), True)


def test_a_preempted_request_begins_anew() -> None:
    driver = driver_with(selections=[SPREAD, SPREAD])
    driver.step(preempted=["a"])
    driver.prefill("a", 12)
    assert (state_of(driver).falls_back, state_of(driver).num_evictable) == (False, 0)


def test_selections_of_a_fallback_do_not_count_as_choices() -> None:
    driver = driver_with(selections=[SPREAD])
    fill_cache(driver)
    counters = driver.planner.counters
    before = (counters.selection_candidates, counters.selected_blocks, counters.reselected_blocks)
    for _ in range(2):
        driver.offer("a", 12, SPREAD)
        driver.step(a=1)
    assert (counters.selection_candidates, counters.selected_blocks, counters.reselected_blocks) == before
    assert (counters.prefetched_blocks, counters.judged_prefetches) == (8, 0)


def test_nobody_falls_back_unless_asked_to() -> None:
    driver = Driver(60)
    driver.prefill("a", 12)
    for _ in range(3):
        driver.offer("a", 12, SPREAD)
        driver.step(a=1)
    assert (state_of(driver).num_evictable, decided(driver)) == (0, (0, 0, 0))
