"""The last selections: when each came into force, what it changed and fetched, and whether a step waited for it."""

import pytest

from flashmemory_vllm.residency.plan import StepPlan
from flashmemory_vllm.residency.types import NewRequest
from flashmemory_vllm.runtime.history import MAX_SELECTIONS, Cycle, SelectionHistory
from flashmemory_vllm.soak.leftovers import find_mentions
from tests.unit.residency.driver import Driver
from tests.unit.runtime.fences import FencesTwin


class Watched:
    """A planner, its history and the engine's fences; one request of 12 full blocks, prefilled."""

    def __init__(self) -> None:
        self.driver = Driver(num_slots=40, ratio=0.4, tau=50)
        self.fences = FencesTwin()
        self.history = SelectionHistory(self.driver.planner, self.fences)
        self.driver.prefill("a", 12, spare_blocks=20)

    def step(self, best: list[int] | None = None, *, late_fence: int | None = None) -> StepPlan:
        """One step; some time after a fence it may turn out to have been late."""
        if best is not None:
            self.driver.offer("a", 12, best=best)
        plan = self.driver.step(a=1)
        self.fences.fence()
        self.fences.late += [] if late_fence is None else [late_fence]
        self.history.note(plan)
        return plan

    def make_absent(self) -> None:
        """Take the slots of all blocks that the request does not hold."""
        usage = self.driver.planner.usage()
        self.driver.prefill("filler", usage.num_slots - usage.slots_pinned, first_block=100, spare_blocks=0)
        self.driver.step(finished=["filler"])

    def newest(self) -> Cycle:
        return next(iter(self.history))


def test_a_first_selection_changes_all_and_fetches_what_has_no_slot() -> None:
    watched = Watched()
    assert list(watched.history) == []
    watched.step(best=[3, 5, 7])
    cycle = watched.newest()
    assert (cycle.step, cycle.first, cycle.num_changed, cycle.late) == (2, True, 5, False)
    assert cycle.chosen[0].tolist() == [0, 3, 5, 7, 12]
    # All of the prompt still had its slots.
    assert cycle.recalled[0].tolist() == []


def test_a_later_selection_counts_against_the_one_before() -> None:
    watched = Watched()
    watched.step(best=[3, 5, 7])
    watched.make_absent()
    watched.step(best=[9, 10, 3])
    cycle = watched.newest()
    assert (cycle.first, cycle.num_changed) == (False, 2)
    assert cycle.recalled[0].tolist() == [9, 10]
    assert len(list(watched.history)) == 2


def test_the_same_choice_again_changes_nothing_though_the_request_grew() -> None:
    watched = Watched()
    watched.step(best=[3, 5, 7])
    for _ in range(4):
        watched.step()
    watched.step(best=[3, 5, 7])
    assert watched.newest().num_blocks > 13
    assert (watched.newest().num_changed, watched.newest().recalled[0].size) == (0, 0)


def test_a_step_without_a_selection_adds_nothing() -> None:
    watched = Watched()
    watched.step(best=[3, 5, 7])
    plan = watched.step()
    assert (len(list(watched.history)), watched.history.step) == (1, plan.step)


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize(("late_step", "is_late"), [(0, True), (1, False), (2, False)])
def test_a_selection_is_late_if_the_step_that_brings_it_waits(late_step: int, is_late: bool, delay: int) -> None:
    watched = Watched()
    watched.step(best=[3, 5, 7])
    watched.make_absent()
    first_fence = watched.fences.num_fences + 1
    for index in range(6):
        late_fence = first_fence + late_step if index == late_step + delay else None
        watched.step(best=[9, 10, 3] if index == 0 else None, late_fence=late_fence)
    assert watched.newest().late is is_late


@pytest.mark.parametrize("is_late", [False, True])
def test_a_first_selection_is_late_if_its_own_step_waits(is_late: bool) -> None:
    driver, fences = Driver(num_slots=14, ratio=0.4, tau=50), FencesTwin()
    history = SelectionHistory(driver.planner, fences)
    # Of a prompt in two chunks the blocks of the first one lose their slots to another request.
    driver.step([NewRequest("a", tuple(range(1, 15)), 0, 48)], a=44)
    driver.step(a=4)
    driver.prefill("b", 12, first_block=100, spare_blocks=0)
    driver.offer("a", 12, best=[3, 5, 7])
    plan = driver.step(a=1, finished=["b"])
    fences.fence()
    fences.late += [1] if is_late else []
    history.note(plan)
    (cycle,) = history
    assert (cycle.first, cycle.recalled[0].tolist(), cycle.late) == (True, [0, 3, 5, 7], is_late)


def test_a_selection_that_fetches_nothing_is_never_late() -> None:
    watched = Watched()
    watched.step(best=[3, 5, 7], late_fence=1)
    assert not watched.newest().late


def test_only_the_last_selections_are_kept() -> None:
    watched = Watched()
    for index in range(MAX_SELECTIONS + 3):
        watched.step(best=[1 + index % 10])
    steps = [cycle.step for cycle in watched.history]
    assert steps == sorted(steps, reverse=True)
    assert len(steps) == MAX_SELECTIONS


def test_a_request_that_comes_again_under_its_name_starts_over() -> None:
    watched = Watched()
    watched.step(best=[3, 5, 7])
    (state,) = watched.driver.planner.requests
    assert watched.history.cycle_of(state) == watched.newest()
    watched.driver.step(preempted=["a"])
    watched.driver.prefill("a", 12, first_block=50)
    (state,) = watched.driver.planner.requests
    assert watched.history.cycle_of(state) is None
    watched.step(best=[3, 5, 7])
    assert watched.newest().first


def test_who_is_gone_is_kept_among_the_last_selections_only() -> None:
    watched = Watched()
    watched.step(best=[3, 5, 7])
    watched.make_absent()
    watched.step(best=[9, 10, 3])
    # Its client goes away before it is known whether the step had to wait
    watched.history.note(watched.driver.step(finished=["a"]))
    assert len(list(watched.history)) == 2
    assert find_mentions({"history": watched.history}, ["a"]) == []
