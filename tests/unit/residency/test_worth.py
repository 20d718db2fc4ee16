"""What blocks are remembered for, what their neighbours are worth, and what a set would rather keep."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flashmemory_vllm.residency.types import FloatArray, NewRequest, Selection
from flashmemory_vllm.residency.worth import Worth
from tests.unit.residency.driver import Driver, positions

SHARES = hnp.arrays(np.float32, st.tuples(st.integers(1, 2), st.integers(0, 6)), elements=st.sampled_from([0, 0.25, 1]))


def scores(*of_blocks: float) -> FloatArray:
    return np.array([of_blocks], np.float32)


@given(selections=st.lists(SHARES, min_size=1, max_size=4), gaps=st.lists(st.integers(0, 4), min_size=4, max_size=4))
def test_memory_is_the_best_score_faded_by_its_age(selections: list[FloatArray], gaps: list[int]) -> None:
    worth = Worth(memory_decay=0.5)
    num_groups = selections[0].shape[0]
    memory, seen, now = None, [], 0
    for chosen, gap in zip(sorted(selections, key=lambda one: one.shape[1]), gaps, strict=False):
        given_now = np.resize(chosen, (num_groups, chosen.shape[1]))
        now += gap
        seen.append((now, given_now))
        memory = worth.remember(given_now, memory, gap)
    assert memory is not None
    expected = np.zeros_like(memory)
    for then, given_then in seen:
        known = expected[:, : given_then.shape[1]]
        np.maximum(known, given_then * 0.5 ** (now - then), out=known)
    assert np.allclose(memory, expected)


def test_a_selection_is_not_changed_by_what_is_made_of_it() -> None:
    asked = scores(1, 0, 0)
    worth = Worth(1.0, 0.5, 1.0)
    memory = worth.remember(asked, scores(0, 1), 3)
    assert (memory.tolist(), worth.of(memory).tolist()) == ([[1, 1, 0]], [[1, 1, 0.5]])
    assert worth.preferring(np.array([0, 2, 9], np.int32), worth.of(memory)[0]).tolist() == [2, 1, 1]
    assert asked.tolist() == [[1, 0, 0]]
    assert memory.tolist() == [[1, 1, 0]]


def test_nothing_is_done_by_default() -> None:
    asked = scores(1, 0)
    assert Worth().remember(asked, scores(0, 1), 1) is asked
    assert Worth().of(asked) is asked
    of_group = asked[0]
    assert Worth().preferring(np.array([1], np.int32), of_group) is of_group


def decoding(worth: Worth) -> Driver:
    """A request of 12 full blocks whose set is 0, 3, 5, 7 and the block that it writes."""
    driver = Driver(ratio=0.4, tau=50, worth=worth)
    driver.prefill("a", 12)
    offer(driver, {3: 0.9, 5: 0.8, 7: 0.7})
    assert positions(driver.step(a=1), "a") == [0, 3, 5, 7, 12]
    return driver


def offer(driver: Driver, best: dict[int, float]) -> None:
    asked = np.zeros((1, 12), np.float32)
    for position, score in best.items():
        asked[0, position] = score
    driver.planner.offer(Selection("a", asked))


def test_what_was_looked_at_before_stays_while_it_is_remembered() -> None:
    for decay, kept in ((0.0, [0, 9, 10, 11, 12]), (0.5, [0, 3, 5, 9, 12])):
        driver = decoding(Worth(memory_decay=decay))
        offer(driver, {9: 0.7, 10: 0.2, 11: 0.1})
        # One token later: 0.45, 0.4 and 0.15 of the first selection
        assert positions(driver.step(a=1), "a") == kept


def test_the_block_behind_one_that_is_looked_at_comes_along() -> None:
    driver = decoding(Worth(successor_share=0.5))
    offer(driver, {9: 0.9, 2: 0.4, 6: 0.3})
    assert positions(driver.step(a=1), "a") == [0, 2, 9, 10, 12]


def test_a_block_in_the_set_gives_way_only_to_one_that_is_much_better() -> None:
    driver = decoding(Worth(hysteresis=1.0))
    offer(driver, {3: 0.3, 5: 0.2, 7: 0.1, 9: 0.5, 10: 0.25})
    # 9 is better than 0.2; 10 is not better than 0.4, nor than twice 0.2
    assert positions(driver.step(a=1), "a") == [0, 3, 5, 9, 12]


def test_what_a_prompt_happens_to_hold_is_not_preferred() -> None:
    driver = Driver(ratio=0.4, tau=50, worth=Worth(hysteresis=9.0))
    driver.step([NewRequest("a", tuple(range(1, 17)), 0, 48)], a=44)
    driver.step(a=4)  # holds block 11 only
    offer(driver, {3: 0.9, 5: 0.8, 7: 0.7, 11: 0.5})
    assert positions(driver.step(a=1), "a") == [0, 3, 5, 7, 12]
