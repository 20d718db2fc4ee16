"""Counters say what a selection chose, what the set before it was worth, and how old evicted blocks were."""

from __future__ import annotations

from itertools import pairwise
from math import inf

import numpy as np
import pytest
from flashmemory_kernels.choose_sets import ChoicePolicy
from hypothesis import given
from hypothesis import strategies as st

from flashmemory_vllm.residency.counters import MAX_WAITING, Counters, Histogram
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import Geometry, IntArray
from tests.unit.residency.driver import Driver, positions

BOUNDS = (1.0, 4.0, 16.0)


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 4.0, 16.0, 17.0]), max_size=5), max_size=2 * MAX_WAITING))
def test_values_are_in_the_range_that_ends_at_or_above_them(observed: list[list[float]]) -> None:
    histogram = Histogram(BOUNDS)
    for values in observed:
        histogram.observe(np.array(values))
    flat = [value for values in observed for value in values]
    counts, total = histogram.read()
    assert list(counts) == [
        sum(above < value <= end for value in flat) for above, end in pairwise((-inf, *BOUNDS, inf))
    ]
    assert total == pytest.approx(sum(flat))
    assert histogram.read() == (counts, total)


def decoding(num_groups: int = 1) -> Driver:
    """A request of 12 full blocks whose set is 0, 3, 5, 7 and the block it writes."""
    driver = Driver(num_slots=40, num_groups=num_groups, ratio=0.4, tau=50)
    driver.prefill("a", 12)
    driver.offer("a", 12, best=[3, 5, 7])
    assert positions(driver.step(a=1), "a") == [0, 3, 5, 7, 12]
    return driver


def chosen(counters: Counters) -> tuple[int, int]:
    return counters.selected_blocks, counters.selection_candidates


def resident_before(counters: Counters) -> tuple[int, int]:
    return counters.reselected_resident_blocks, counters.reselected_blocks


def worth_prefetching(counters: Counters) -> tuple[int, int]:
    return counters.useful_prefetches, counters.judged_prefetches


@pytest.mark.parametrize("num_groups", [1, 2])
def test_forced_blocks_are_neither_candidates_nor_chosen(num_groups: int) -> None:
    # Sink and tail are forced, of 13 blocks
    assert chosen(decoding(num_groups).planner.counters) == (3 * num_groups, 11 * num_groups)


def test_a_threshold_lowers_the_selected_share() -> None:
    driver = Driver(ratio=0.4, chooses=ChoicePolicy(threshold=1999.0))
    driver.prefill("a", 12)
    # Worth 2000, 1999 and 1998; all others less
    driver.offer("a", 12, best=[3, 5, 7])
    assert positions(driver.step(a=1), "a") == [0, 3, 5, 12]
    assert chosen(driver.planner.counters) == (2, 11)


@pytest.mark.parametrize("num_groups", [1, 2])
def test_a_later_selection_judges_the_set_before_it(num_groups: int) -> None:
    driver = decoding(num_groups)
    counters = driver.planner.counters
    assert resident_before(counters) == (0, 0)
    driver.offer("a", 12, best=[9, 5, 10])
    driver.step(a=1)
    assert resident_before(counters) == (num_groups, 3 * num_groups)
    assert worth_prefetching(counters) == (0, 0)


@pytest.mark.parametrize("num_groups", [1, 2])
def test_prefetches_are_judged_by_the_selection_that_follows(num_groups: int) -> None:
    driver = decoding(num_groups)
    counters = driver.planner.counters
    # Elsewhere in use, so that 9 and 10 have to come from the host
    for best in ([9, 5, 10], [9, 5, 3]):
        drop_cached(driver)
        driver.offer("a", 12, best=best)
        driver.step(a=1)
        driver.step(a=1)
    assert worth_prefetching(counters) == (num_groups, 2 * num_groups)


def drop_cached(driver: Driver) -> None:
    """Take every slot that no request holds, and give it back as cache of a request that is gone."""
    usage = driver.planner.usage()
    driver.prefill("filler", usage.num_slots - usage.slots_pinned, first_block=100, spare_blocks=0)
    driver.step(finished=["filler"])


def test_without_selections_nothing_is_judged() -> None:
    driver = Driver()
    driver.prefill("a", 12)
    driver.step(a=1)
    counters = driver.planner.counters
    assert chosen(counters) == resident_before(counters) == worth_prefetching(counters) == (0, 0)


def ids(*blocks: int) -> IntArray:
    return np.array(blocks, np.int32)


def test_evicted_blocks_have_a_lifetime_and_an_idle_time() -> None:
    table = SlotTable(Geometry(num_logical_blocks=20, num_slots=3, num_groups=1, block_size=4))
    for step in range(1, 11):
        table.begin_step()
        if step == 1:
            table.hold_fresh(0, ids(1, 2))
            table.mark_written_back(ids(1, 2))
        if step == 4:
            table.unpin(0, ids(1, 2))
            table.touch(0, ids(2, 1))
    assert sum(table.idle_steps.read().counts) == 0
    table.hold_fresh(0, ids(3))
    # In its slot since step 1 and read in step 4; now it is step 10
    assert table.lifetime_steps.read() == ((0, 0, 1, 0, 0, 0, 0, 0, 0), 9.0)
    assert table.idle_steps.read() == ((0, 0, 1, 0, 0, 0, 0, 0, 0), 6.0)
    table.clear()
    assert table.idle_steps.read().total == 6.0
