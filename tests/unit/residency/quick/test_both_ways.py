"""The quick way through the books is the way that `Books` describes, compiled or not, and leaves the rest to it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.residency.lists import Chosen
from flashmemory_vllm.residency.plan import StepPlan
from flashmemory_vllm.residency.planner import StepPlanner
from flashmemory_vllm.residency.quick import asking_loops, change_loops, growth_loops, note_loops, slot_loops
from flashmemory_vllm.residency.quick.books import QuickBooks
from flashmemory_vllm.residency.quick.compiled import IS_COMPILED, plain
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import Copies, Geometry, IntArray, StepInput
from tests.unit.residency.test_books import ids, listed
from tests.unit.residency.test_histories import History, World, worlds

MODULES = (change_loops, slot_loops, note_loops, asking_loops, growth_loops)
needs_numba = pytest.mark.skipif(not IS_COMPILED, reason="numba is not there")


@pytest.fixture(params=["plain", pytest.param("compiled", marks=needs_numba)], scope="module")
def _way(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES if request.param == "plain" else ():
            for name, value in vars(module).items():
                if callable(value) and plain(value) is not value:
                    patch.setattr(module, name, plain(value))
        yield


class Pair(StepPlanner):
    """Makes every plan a second time in the quick way, and compares."""

    num_quick = 0

    def follow(self, world: World) -> None:
        """Begin."""
        self.quick = StepPlanner(
            self.geometry,
            world.policy,
            world.tau,
            world.max_prefetches,
            world.fallback_share,
            world.opening_steps,
            is_quick=True,
        )
        books = self.quick._books
        apply = books.apply_quickly

        def counted(*arguments: object) -> object:
            pairs = apply(*arguments)  # type: ignore[arg-type]
            Pair.num_quick += pairs is not None
            return pairs

        books.apply_quickly = counted  # type: ignore[assignment, method-assign]

    def plan(self, step_input: StepInput, lists: Sequence[Chosen] = ()) -> StepPlan:
        plan, quick = super().plan(step_input, lists), self.quick.plan(step_input, lists)
        self._of_quick = quick
        for name in ("step", "evicted", "selected"):
            assert getattr(plan, name) == getattr(quick, name)
        for name in ("fresh", "recalls", "prefetches"):
            assert told(getattr(plan, name)) == told(getattr(quick, name))
        assert (plan.write_backs.slots == quick.write_backs.slots).all()
        assert plan.asked.req_ids == quick.asked.req_ids
        assert (plan.asked.fields == quick.asked.fields).all()
        self._compare()
        self.quick.check_integrity()
        return plan

    def complete(self, step_plan: StepPlan) -> None:
        super().complete(step_plan)
        self.quick.complete(self._of_quick)
        for edits, of_quick in zip(self.take_edits(), self.quick.take_edits(), strict=True):
            assert set(map(tuple, edits.tolist())) == set(map(tuple, of_quick.tolist()))

    def _compare(self) -> None:
        mine, other = self._books, self.quick._books
        assert (mine.epoch == other.epoch).all()
        for of_mine, of_quick in zip(mine.groups, other.groups, strict=True):
            for table, of_other in zip(of_mine.arrays, of_quick.arrays, strict=True):
                if table.shape == of_mine.position.shape:  # behind its entries a table says nothing
                    used = np.arange(table.shape[1]) < of_mine.count[:, None]
                    assert (table[used] == of_other[used]).all()
                else:
                    assert (table == of_other).all()
        for group in range(self.geometry.num_groups):
            of_slots, of_others = self._slots.arrays(group), self.quick._slots.arrays(group)
            for name in ("lut", "host_valid", "pins", "last_read", "owner", "counts"):
                assert (getattr(of_slots, name) == getattr(of_others, name)).all(), name
            assert (self._slots._idle[group].live() == self.quick._slots._idle[group].live()).all()
        for field in self.counters.__slots__:
            value, of_other = getattr(self.counters, field), getattr(self.quick.counters, field)
            assert value.read() == of_other.read() if hasattr(value, "read") else value == of_other, field


def told(copies: Sequence[Copies]) -> list[tuple[int, list[int], list[int], int]]:
    return [(one.group, one.blocks.tolist(), one.slots.tolist(), one.rested) for one in copies]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(worlds())
def run_histories(world: World) -> None:
    # Almost all lists are left to the books where requests fall back
    world = replace(world, fallback_share=None if world.seed % 4 else world.fallback_share)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[History.__module__], "StepPlanner", Pair)
        history = History(world)
    assert isinstance(history.planner, Pair)
    history.planner.follow(world)
    history.run()


def compiled_for() -> list[int]:
    """Kinds of arguments that each loop has code for."""
    every = [value for module in MODULES for value in vars(module).values()]
    return [len(value.signatures) for value in every if hasattr(value, "signatures")]


@pytest.mark.usefixtures("_way")
def test_both_ways_make_the_same_plans() -> None:
    StepPlanner(Geometry(40, 20, 1, 4), BudgetPolicy(4, 0.5, 0, 4, 8, 16, 64, 4), 1, is_quick=True)
    Pair.num_quick, num_compiled = 0, compiled_for()
    run_histories()
    assert Pair.num_quick > 100
    # Nothing is compiled in the middle of a step
    assert compiled_for() == num_compiled


def entered(num_slots: int = 20) -> tuple[QuickBooks, SlotTable]:
    """A request of ten blocks in place 1 that reads 0 of the sink, 3, 5, and 8, 9; all ten are on the host."""
    geometry = Geometry(40, num_slots, 1, 4)
    slots = SlotTable(geometry)
    slots.begin_step()
    slots.mark_written_back(np.arange(1, 30, dtype=np.int32))
    books = QuickBooks(geometry, slots, 3, 16)
    books.enter(1, np.arange(1, 11, dtype=np.int32), [ids(0, 3, 5, 8, 9)], sink=1, recent=2)
    books.settle()
    books.know_blocks(1, 10, [30])  # given ahead
    return books, slots


def asked(place: int = 1, epoch: int = 0, is_new: int = 0) -> IntArray:
    fields = np.zeros((1, 13), np.int32)
    fields[0, :2], fields[0, 10] = (place, epoch), is_new
    return fields


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize(
    ("come", "go"),
    [
        ([3], [5]),
        ([4], [4]),
        ([9], [3]),
        ([4], [0]),
        ([4], [9]),
        ([4, 4], [3, 5]),
        ([4, 6], [3, 3]),
        ([99], [3]),
        ([-7], [3]),
        ([4], [99]),
        ([4], [-7]),
        ([-1], []),
        ([10], [3]),
    ],
)
def test_what_does_not_follow_is_left_to_the_books_as_it_is(come: list[int], go: list[int]) -> None:
    books, slots = entered()
    before = [array.copy() for array in (*books.groups[0].arrays, *slots.arrays(0))]
    assert books.apply_quickly(0, listed(come, go), asked()) is None
    for array, was in zip((*books.groups[0].arrays, *slots.arrays(0)), before, strict=True):
        assert (array == was).all()
    assert books.apply_quickly(0, listed([4], [3]), asked()) is not None


@pytest.mark.usefixtures("_way")
def test_rare_lists_are_left_to_the_books() -> None:
    books, _ = entered()
    right = listed([4], [3])
    assert books.apply_quickly(0, right, asked(place=2)) is None
    assert books.apply_quickly(1, right, asked()) is None
    assert books.apply_quickly(0, right, asked(is_new=1)) is None
    assert books.apply_quickly(0, listed([4], [3], epoch=1), asked(epoch=1)) is not None
    assert books.groups[0].positions_of(1).tolist() == [0, 3, 5, 8, 9]
    assert books.apply_quickly(0, right, asked()) is None


@pytest.mark.usefixtures("_way")
def test_a_slot_with_too_few_pins_is_told_of() -> None:
    books, slots = entered()
    slots.pins[0, slots.lut[0, [4, 6]]] = 1, 1
    slots.lut[0, 6] = slots.lut[0, 4]
    with pytest.raises(IntegrityError, match="fewer pins"):
        books.apply_quickly(0, listed([4, 6], [3, 5]), asked())
