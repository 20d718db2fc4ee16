"""When requests come due: spread over the cycle from the first time on; rows that grow are chosen for in any case."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmemory_vllm.residency.asking import farthest
from flashmemory_vllm.residency.budget import cdiv
from tests.unit.residency.driver import BLOCK, Driver


def started(names: Iterable[str], tau: int) -> Driver:
    """A driver with one request for each name, all prefilled; the last of them in the last step."""
    driver = Driver(num_slots=190, tau=tau)
    for index, name in enumerate(names):
        driver.prefill(name, 4, first_block=1 + 12 * index, spare_blocks=8)
    return driver


def due_by_step(driver: Driver, names: Iterable[str], num_steps: int) -> list[list[str]]:
    tokens = dict.fromkeys(names, 1)
    plans = [driver.step(tokens=tokens) for _ in range(num_steps)]
    return [[one.req_id for one in plan.asked if one.is_scored and not one.at_once] for plan in plans]


def test_a_lone_request_is_due_every_tau_steps() -> None:
    driver = started("a", tau=4)
    assert due_by_step(driver, "a", 12) == [[], [], [], ["a"]] * 3


def test_requests_that_start_together_come_due_evenly() -> None:
    driver = started("abcd", tau=8)
    steps = due_by_step(driver, "abcd", 16)
    assert [sorted(names) for names in steps] == [[], ["d"], [], ["b"], [], ["c"], [], ["a"]] * 2


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


def test_an_opening_is_scored_step_by_step() -> None:
    driver = Driver(num_slots=190, tau=8, opening_steps=2)
    for index, name in enumerate("abc"):
        asked = driver.prefill(name, 4, first_block=1 + 12 * index, spare_blocks=8).asked[-1]
        assert (asked.is_new, asked.at_once) == (True, True)
    tokens = dict.fromkeys("abc", 1)
    plans = [driver.step(tokens=tokens) for _ in range(12)]
    opening = [{one.req_id for one in plan.asked if one.at_once} for plan in plans]
    assert opening == [set("abc"), set("abc"), *[set()] * 10]
    assert not any(one.is_new for plan in plans for one in plan.asked)
    later = [one.req_id for plan in plans for one in plan.asked if one.is_scored and not one.at_once]
    assert set(later) == set("abc")


def test_a_row_that_begins_a_block_is_chosen_for_without_scores_or_fetches() -> None:
    driver = started("a", tau=50)
    asked = [driver.step(a=1).asked for _ in range(2 * BLOCK)]
    assert [len(of_step) for of_step in asked] == [1, 0, 0, 0] * 2
    for (one,) in asked[::BLOCK]:
        assert (one.is_scored, one.cap, one.at_once, one.is_new) == (False, 0, False, False)


def test_rows_share_what_may_be_fetched_and_have_a_block_each_in_any_case() -> None:
    for max_prefetches, share in ((7, 3), (1, 1)):
        driver = Driver(num_slots=190, tau=1, max_prefetches=max_prefetches)
        for index, name in enumerate("ab"):
            driver.prefill(name, 4, first_block=1 + 12 * index, spare_blocks=8)
        assert [one.cap for one in driver.step(a=1, b=1).asked] == [share, share]


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
