"""Books driven by the planner: edits make the tables that rows read, and a list of nonsense changes nothing."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.lists import HEADER, Chosen
from flashmemory_vllm.residency.types import NewRequest
from tests.unit.residency.driver import BLOCK, Driver, positions

NUM_GROUPS, NUM_STEPS = 2, 40


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), max_prefetches=st.sampled_from([None, 1, 3]))
def test_edits_make_the_tables_that_rows_read(seed: int, max_prefetches: int | None) -> None:
    """Requests begin, are chosen for at random, pause and end."""
    random, numbers = Random(seed), np.random.default_rng(seed)
    driver = Driver(190, NUM_GROUPS, 5, 0.4, recent=2 * BLOCK, max_prefetches=max_prefetches)
    tables = np.zeros((NUM_GROUPS, 64, 110), np.int32)
    length, free = dict[str, int](), [f"r{index}" for index in range(7)]
    finished: list[str] = []
    for _ in range(NUM_STEPS):
        tokens, new = {name: 1 for name in length if random.random() < 0.9}, []
        if len(length) < 4 and random.random() < 0.5:
            name, size = free.pop(), random.randint(5 * BLOCK, 12 * BLOCK)
            first = 1 + 26 * int(name[1:])
            new = [NewRequest(name, tuple(range(first, first + 26)), 0, size)]
            tokens[name], length[name] = size, 0
        plan = driver.step(new, finished, tokens=tokens)
        free += finished
        for group, edits in enumerate(driver.planner.take_edits()):
            place, entry, slot = edits.T
            tables[group, place, entry] = slot
        for name, count in tokens.items():
            length[name] += count
            at, slots = driver.place_of(name), plan.rows[name].slots
            for group in range(NUM_GROUPS if count == 1 else 0):
                assert (tables[group, at, : slots[group].size] == slots[group]).all()
            if random.random() < 0.4:
                worth = numbers.integers(0, 5, (NUM_GROUPS, length[name] // BLOCK)).astype(np.float32)
                driver.lists.offer(name, worth)
        finished = [name for name in length if length[name] > 22 * BLOCK or random.random() < 0.03]
        for name in finished:
            del length[name]


def nonsense(driver: Driver, monkeypatch: pytest.MonkeyPatch, column: int, value: int) -> None:
    """Have the next lists say something else in a column of their rows."""
    take = driver.lists.take

    def wrong() -> list[Chosen]:
        lists = take()
        for chosen in lists:
            chosen.rows[:, :, column] = value
        return lists

    monkeypatch.setattr(driver.lists, "take", wrong)


def decoding() -> Driver:
    """A request that reads 0, 3, 5, 7 and 12, for which others are chosen."""
    driver = Driver(num_slots=40, ratio=0.4, tau=50)
    driver.prefill("a", 12)
    driver.offer("a", 12, best=[3, 5, 7])
    driver.step(a=1)
    driver.offer("a", 12, best=[9, 3, 5])
    return driver


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [(HEADER, 0, "sets"), (HEADER, 5, "sets"), (HEADER, 99, "sets"), (0, 70, "list of places"), (1, 7, "list of")],
)
def test_a_list_that_says_nonsense_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, column: int, value: int, message: str
) -> None:
    driver = decoding()
    books = driver.planner._books
    before = books.groups[0].slots_of(0).tolist()
    nonsense(driver, monkeypatch, column, value)
    with pytest.raises(IntegrityError, match=message):
        driver.step(a=1)
    assert books.groups[0].slots_of(0).tolist() == before
    books.check_integrity()
    assert (books.pins() == books._slots.pins).all()


def test_a_list_of_another_tenant_is_not_for_this_one() -> None:
    driver = decoding()
    late = driver.lists.take()
    driver.prefill("b", 12, first_block=30)
    driver.step(finished=["a"])
    driver.offer("b", 12, best=[3, 5, 7])
    driver.prefill("c", 12, first_block=60)
    assert driver.place_of("c") == late[0].asked[0].place
    driver.step(c=1, b=1)
    driver.lists.take = lambda: late  # type: ignore[method-assign]
    assert positions(driver.step(c=1, b=1), "c") == [0, 9, 10, 11, 12]


def test_a_sparse_row_without_a_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    driver.prefill("a", 12)
    monkeypatch.setattr(driver.lists, "take", list)
    with pytest.raises(IntegrityError, match="no set was chosen"):
        driver.step(a=1)


def test_rows_that_keep_all_blocks_are_in_the_books_in_order() -> None:
    driver = Driver(num_slots=60, min_sparse=40)
    driver.prefill("a", 4)
    for _ in range(9):
        row = driver.step(a=1).rows["a"]
        assert row.positions[0].tolist() == [*range(row.positions[0].size)]


def test_a_place_has_one_request_at_a_time() -> None:
    driver = Driver(num_slots=60)
    driver.prefill("a", 4)
    driver.prefill("b", 4, first_block=20)
    first = driver.place_of("a")
    assert first != driver.place_of("b")
    driver.step(finished=["a"])
    assert driver.planner.requests.get("a") is None
    driver.prefill("c", 4, first_block=40)
    assert driver.place_of("c") == first
