"""Books driven by the planner: each row's set is that of a twin that sorts, and edits make the device's tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.budget import cdiv
from flashmemory_vllm.residency.host_lists import HostLists
from flashmemory_vllm.residency.lists import HEADER
from flashmemory_vllm.residency.types import IntArray, NewRequest, Selection, StepPlan
from flashmemory_vllm.residency.worth import Worth
from tests.unit.residency.driver import BLOCK, Driver, positions

NUM_GROUPS, SINK, MOST_BLOCKS, NUM_STEPS, NUM_PLACES = 2, 1, 24, 30, 64


@dataclass
class Twin:
    """One request as plain sets: by group what it reads, and what its blocks are worth by the last scores."""

    num_tokens: int
    first_block: int
    read: list[set[int]] = field(default_factory=lambda: [set() for _ in range(NUM_GROUPS)])
    worth: list[list[float]] = field(default_factory=lambda: [[] for _ in range(NUM_GROUPS)])
    is_due: bool = False
    decodes: bool = False

    def step(self, driver: Driver, cap: int, threshold: float, hysteresis: float) -> None:
        """Decode a token; at most so many blocks may be new, unless there is no set yet."""
        policy = driver.planner.requests.policy
        self.num_tokens += 1
        end = cdiv(self.num_tokens, BLOCK)
        first_recent = end - policy.recent_blocks(self.num_tokens)
        candidates = range(SINK, first_recent)
        want = policy.decode_budget(self.num_tokens) - SINK - (end - first_recent)
        left = False
        for group, worth in enumerate(self.worth):
            far = {one for one in self.read[group] | {end - 1} if one in candidates}
            value = {one: worth[one] if one < len(worth) else inf for one in candidates}
            order = sorted(candidates, key=lambda one: (value[one] * (1 + hysteresis * (one in far)), one))
            chosen = [one for one in order if value[one] >= threshold]
            chosen = chosen[max(0, len(chosen) - want) :]
            new = [one for one in chosen if one not in far]
            come = new if not self.decodes else new[max(0, len(new) - cap) :] if self.is_due else []
            left |= len(come) < len(new)
            num_going = max(0, len(far) + len(come) - len(chosen))
            far -= set([one for one in order if one in far][:num_going])
            self.read[group] = {*range(SINK), *far, *come, *range(first_recent, end)}
        self.is_due, self.decodes = self.is_due and left, True


class World:
    """Requests begin, are selected for at random, pause and end; the twins go beside."""

    def __init__(self, seed: int, max_prefetches: int | None, threshold: float, hysteresis: float) -> None:
        self.random, self.scores = Random(seed), np.random.default_rng(seed)
        self.cap = max_prefetches or MOST_BLOCKS
        self.threshold, self.hysteresis = threshold, hysteresis
        self.driver = Driver(
            190, NUM_GROUPS, 50, 0.4, recent=2 * BLOCK, score_threshold=threshold, max_prefetches=max_prefetches,
            worth=Worth(hysteresis=hysteresis),
        )  # fmt: skip
        self.twins: dict[str, Twin] = {}
        self.tables = np.zeros((NUM_GROUPS, NUM_PLACES, 110), np.int32)
        self.num_begun, self.free_areas = 0, list(range(7))

    def begin(self) -> None:
        """A prompt in one step, and its first selection."""
        name, num_blocks = f"r{self.num_begun}", self.random.randint(5, 12)
        num_tokens = num_blocks * BLOCK - self.random.randrange(BLOCK)
        self.num_begun += 1
        first_block = 1 + 26 * self.free_areas.pop()
        blocks = tuple(range(first_block, first_block + 26))
        self.driver.step([NewRequest(name, blocks, 0, num_tokens)], tokens={name: num_tokens})
        self.twins[name] = Twin(num_tokens, first_block)
        self.offer(name)

    def offer(self, name: str) -> None:
        """Few different scores, for some or all of its blocks."""
        twin = self.twins[name]
        num_scored = max(1, twin.num_tokens // BLOCK - self.random.randrange(2))
        scores = self.scores.integers(0, 5, (NUM_GROUPS, num_scored)).astype(np.float32)
        self.driver.planner.offer(Selection(name, scores))
        twin.worth, twin.is_due = scores.tolist(), True

    def step(self) -> None:
        """Some decode a token."""
        running = [name for name in self.twins if self.random.random() < 0.9]
        for name in running:
            self.twins[name].step(self.driver, self.cap, self.threshold, self.hysteresis)
        self.check(self.driver.step(tokens=dict.fromkeys(running, 1)), running)
        for name in running:
            twin = self.twins[name]
            if twin.num_tokens == MOST_BLOCKS * BLOCK or self.random.random() < 0.03:
                self.free_areas.append(self.twins.pop(name).first_block // 26)
                self.driver.step(finished=[name])
            elif self.random.random() < 0.3:
                self.offer(name)

    def check(self, plan: StepPlan, running: list[str]) -> None:
        """Rows read what the twins say, and that is what the device's tables hold."""
        for group, edits in enumerate(self.driver.planner.take_edits()):
            place, entry, slot = edits.T
            self.tables[group, place, entry] = slot
        for name in running:
            row, place = plan.rows[name], self.driver.planner.place_of(name)
            for group in range(NUM_GROUPS):
                assert positions(plan, name, group) == sorted(self.twins[name].read[group])
                slots = row.slots[group]
                assert (self.tables[group, place, : slots.size] == slots).all()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    max_prefetches=st.sampled_from([None, 1, 3]),
    threshold=st.sampled_from([-inf, 2.0]),
    hysteresis=st.sampled_from([0.0, 1.0]),
)
def test_sets_are_those_of_a_twin(seed: int, max_prefetches: int | None, threshold: float, hysteresis: float) -> None:
    world = World(seed, max_prefetches, threshold, hysteresis)
    # A bound is shared by those that wait: with one there is one request
    most = 1 if max_prefetches else 4
    for _ in range(NUM_STEPS):
        if len(world.twins) < most and world.random.random() < 0.5:
            world.begin()
        world.step()


def nonsense(monkeypatch: pytest.MonkeyPatch, column: int, value: int) -> None:
    """Have every list made from now on say something else in a column of its rows."""
    make = HostLists.make

    def wrong(self: HostLists, *asked: Any) -> IntArray:
        listed = make(self, *asked)
        listed[:, :, column] = value
        return listed

    monkeypatch.setattr(HostLists, "make", wrong)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [(HEADER, 0, "comes"), (HEADER, 5, "comes"), (HEADER, 99, "comes"), (HEADER + 1, 4, "goes"), (0, 70, "places")],
)
def test_a_list_that_says_nonsense_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, column: int, value: int, message: str
) -> None:
    driver = Driver(num_slots=40, ratio=0.4, tau=50)
    driver.prefill("a", 12)
    driver.offer("a", 12, best=[3, 5, 7])
    before = driver.step(a=1).rows["a"]
    driver.offer("a", 12, best=[9, 3, 5])
    nonsense(monkeypatch, column, value)
    with pytest.raises(IntegrityError, match=message):
        driver.step(a=1)
    books = driver.planner._books
    assert books.groups[0].slots_of(0).tolist() == before.slots[0].tolist()
    books.check_integrity()
    assert (books.pins() == books._slots.pins).all()


def test_a_list_of_another_tenant_is_not_for_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(num_slots=40, ratio=0.4, tau=50)
    driver.prefill("a", 12)
    driver.offer("a", 12, best=[3, 5, 7])
    driver.step(a=1)
    driver.offer("a", 12, best=[9, 3, 5])
    nonsense(monkeypatch, 1, 7)
    assert positions(driver.step(a=1), "a") == [0, 3, 5, 7, 12]


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
    planner = driver.planner
    first = planner.place_of("a")
    assert first != planner.place_of("b")
    driver.step(finished=["a"])
    with pytest.raises(IntegrityError, match="request a is not known"):
        planner.place_of("a")
    driver.prefill("c", 4, first_block=40)
    assert planner.place_of("c") == first
