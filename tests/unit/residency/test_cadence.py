"""When requests come due: spread over the cycle from the first time on, and never too many at once."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmemory_vllm.residency.budget import cdiv
from flashmemory_vllm.residency.cadence import farthest
from tests.unit.residency.driver import Driver


def started(names: Iterable[str], tau: int) -> Driver:
    """A driver with one request for each name, all prefilled; the last of them in the last step."""
    driver = Driver(num_slots=190, tau=tau)
    for index, name in enumerate(names):
        driver.prefill(name, 4, first_block=1 + 12 * index, spare_blocks=8)
    return driver


def due_by_step(driver: Driver, names: Iterable[str], num_steps: int) -> list[list[str]]:
    tokens = dict.fromkeys(names, 1)
    return [[one.req_id for one in driver.step(tokens=tokens).due] for _ in range(num_steps)]


def test_a_lone_request_is_due_every_tau_steps() -> None:
    driver = started("a", tau=4)
    assert due_by_step(driver, "a", 12) == [[], [], [], ["a"]] * 3


def test_requests_that_start_together_come_due_evenly() -> None:
    driver = started("abcd", tau=8)
    steps = due_by_step(driver, "abcd", 16)
    assert steps == [[], ["d"], [], ["b"], [], ["c"], [], ["a"]] * 2


@given(st.integers(1, 9), st.integers(1, 12))
def test_nobody_waits_longer_than_a_cycle(tau: int, num_requests: int) -> None:
    names = [f"r{index}" for index in range(num_requests)]
    steps = due_by_step(started(names, tau), names, 2 * tau)
    assert max(map(len, steps)) <= cdiv(num_requests, tau)
    for cycle in (steps[:tau], steps[tau:]):
        assert sorted(name for step in cycle for name in step) == sorted(names)


def test_a_request_that_comes_later_takes_the_free_half_of_the_cycle() -> None:
    driver = started("a", tau=8)
    due_by_step(driver, "a", 2)
    # Due in 6, 14 and so on: the newcomer in 2, 10 and so on.
    driver.prefill("b", 4, first_block=50, spare_blocks=8)
    assert [step for step, names in enumerate(due_by_step(driver, "b", 12), 1) if "b" in names] == [2, 10]


def test_the_longest_waiting_is_scored_first() -> None:
    driver = started("abc", tau=6)
    # They are due in 6, 3 and 4 steps; a catches up with b.
    due_by_step(driver, "a", 3)
    assert due_by_step(driver, "cab", 5) == [[], [], ["a"], ["b"], ["c"]]


def test_an_opening_is_scored_step_by_step_whatever_the_cap() -> None:
    driver = Driver(num_slots=190, tau=8, opening_steps=2)
    for index, name in enumerate("abc"):
        (due,) = driver.prefill(name, 4, first_block=1 + 12 * index, spare_blocks=8).due
        assert (due.first, due.at_once) == (True, True)
    tokens = dict.fromkeys("abc", 1)
    plans = [driver.step(tokens=tokens) for _ in range(12)]
    opening = [{due.req_id for due in plan.due if due.at_once} for plan in plans]
    assert opening == [set("abc"), set("abc"), *[set()] * 10]
    assert not any(due.first for plan in plans for due in plan.due)
    later = [due.req_id for plan in plans for due in plan.due if not due.at_once]
    assert set(later) == set("abc")


def test_a_hastened_request_is_due_with_its_next_step() -> None:
    driver = started("ab", tau=8)
    due_by_step(driver, "ab", 1)
    # They would be due in seven and in three steps.
    driver.planner.hasten(["a", "gone"])
    assert due_by_step(driver, "b", 1) == [[]]
    assert due_by_step(driver, "ab", 9) == [["a"], ["b"], *[[]] * 6, ["a"]]
    assert driver.planner.counters.drift_selections == 1


def test_the_cap_holds_for_hastened_requests_too() -> None:
    driver = started("abcd", tau=8)
    due_by_step(driver, "abcd", 1)
    driver.planner.hasten("abcd")
    driver.planner.hasten("abcd")
    # d is due now anyway. All four want to be, and one in eight rows, rounded up, may.
    by_step = due_by_step(driver, "abcd", 4)
    assert [len(names) for names in by_step] == [1, 1, 1, 1]
    assert sorted(name for names in by_step for name in names) == ["a", "b", "c", "d"]
    assert driver.planner.counters.drift_selections == 3


def test_nobody_is_hastened_before_a_first_selection_or_with_all_blocks() -> None:
    driver = Driver(num_slots=60, tau=8, score_threshold=-1000.0, fallback_share=0.5)
    driver.prefill("a", 12)
    driver.prefill("dense", 2, first_block=50)
    for _ in range(2):
        driver.offer("a", 12, [3])
        driver.step(a=1, dense=1)
    driver.planner.hasten(["a", "dense"])
    assert driver.planner.counters.drift_selections == 0
    assert due_by_step(driver, ["a", "dense"], 1) == [[]]


@pytest.mark.parametrize(
    ("taken", "step"),
    [([], 8), ([8], 4), ([0, 4], 6), ([0, 4, 6], 2), ([3], 7), ([-1], 3), ([*range(8)], 8), ([*range(8), 0], 4)],
)
def test_the_farthest_step(taken: list[int], step: int) -> None:
    assert farthest(taken, 8) == step


@given(st.lists(st.integers(-30, 30), max_size=30), st.integers(1, 12))
def test_the_farthest_step_is_one_of_the_least_taken(taken: list[int], tau: int) -> None:
    step = farthest(taken, tau)
    assert 1 <= step <= tau
    counts = [sum((other - candidate) % tau == 0 for other in taken) for candidate in range(1, tau + 1)]
    assert counts[step - 1] == min(counts)
