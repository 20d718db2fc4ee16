"""The step planner, rule by rule, on requests small enough to follow by hand. Blocks hold 4 tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from flashmemory_vllm.errors import ConfigError, IntegrityError, UnsupportedError
from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.residency.planner import StepPlanner
from flashmemory_vllm.residency.types import (
    Geometry,
    NewRequest,
    Phase,
    RunningRequest,
    Selection,
    StepInput,
    StepPlan,
)

BLOCK = 4


class Driver:
    """Drives a planner with as few words as possible; completes every plan."""

    def __init__(
        self, num_slots: int = 40, num_groups: int = 1, tau: int = 3, ratio: float = 0.25, min_sparse: int = 0
    ) -> None:
        # Sink of one block, recent of one: a sparse set of n blocks has max(3, ratio * n).
        policy = BudgetPolicy(BLOCK, ratio, min_sparse, 1, 1, 400, 400, 0)
        self.planner = StepPlanner(Geometry(200, num_slots, num_groups, BLOCK), policy, tau)
        self.computed: dict[str, int] = {}
        self._step = 0

    def step(
        self,
        new: Sequence[NewRequest] = (),
        finished: Sequence[str] = (),
        preempted: Sequence[str] = (),
        tokens: Mapping[str, int] | None = None,
        **more_tokens: int,
    ) -> StepPlan:
        """Plan and complete one step; requests and their tokens come as keywords or as a mapping."""
        num_tokens = {**(tokens or {}), **more_tokens}
        self._step += 1
        self.computed |= {one.req_id: one.num_computed_tokens for one in new}
        fresh_ids = {one.req_id for one in new}
        running = tuple(
            RunningRequest(req_id, (), self.computed[req_id])
            for req_id in num_tokens
            if req_id not in fresh_ids
        )
        plan = self.planner.plan(StepInput(self._step, finished, preempted, tuple(new), running, num_tokens))
        self.planner.check_integrity()
        self.planner.complete(plan)
        self.planner.check_integrity()
        for req_id, count in num_tokens.items():
            self.computed[req_id] += count
        return plan

    def prefill(self, req_id: str, num_blocks: int, first_block: int = 1, spare_blocks: int = 4) -> StepPlan:
        """Prefill a prompt of full blocks in one step; block ids are consecutive, some for growth."""
        blocks = tuple(range(first_block, first_block + num_blocks + spare_blocks))
        return self.step(
            [NewRequest(req_id, blocks, 0, num_blocks * BLOCK)], tokens={req_id: num_blocks * BLOCK}
        )

    def offer(self, req_id: str, num_scored: int, best: Sequence[int]) -> None:
        """A selection that likes the blocks given, the first one most, and all others by age."""
        scores = -np.arange(num_scored, dtype=np.float32)
        scores[list(best)] = 100 - np.arange(len(best))
        groups = self.planner.lut.shape[0]
        self.planner.offer(Selection(req_id, np.tile(scores, (groups, 1))))


def positions(plan: StepPlan, req_id: str, group: int = 0) -> list[int]:
    return [int(position) for position in plan.rows[req_id].positions[group]]


def test_a_prompt_is_written_back_as_its_blocks_fill() -> None:
    driver = Driver()
    plan = driver.step([NewRequest("a", (5, 6, 7), 0, 11)], a=6)
    assert plan.fresh[0].blocks.tolist() == [5, 6]
    assert plan.write_backs.blocks.tolist() == [5]
    assert plan.due == ()
    plan = driver.step(a=5)
    row = plan.rows["a"]
    assert (row.phase, row.num_computed_tokens, row.num_tokens) == (Phase.PREFILL, 6, 5)
    assert plan.write_backs.blocks.tolist() == [6]
    assert plan.write_backs.slots.tolist() == [[driver.planner.lut[0, 6]]]
    assert positions(plan, "a") == [0, 1, 2]
    assert row.evicted_tokens == (0,)


def test_first_selection_is_due_at_the_end_of_prefill_and_recalled_at_once() -> None:
    driver = Driver(num_slots=14)
    driver.step([NewRequest("a", tuple(range(1, 15)), 0, 48)], a=44)
    (due,) = driver.step(a=4).due
    assert (due.req_id, due.first, due.num_history_blocks) == ("a", True, 12)
    assert due.block_ids.tolist() == list(range(1, 13))
    driver.prefill("b", 12, first_block=100)  # takes all slots but that of the block written last
    driver.offer("a", 12, best=[4])
    plan = driver.step(a=1, finished=["b"])
    # 13 blocks, a quarter of them: the sink, the best one, and the tail.
    assert positions(plan, "a") == [0, 4, 12]
    assert plan.rows["a"].evicted_tokens == (10 * BLOCK,)
    assert plan.recalls[0].blocks.tolist() == [1, 5]
    assert plan.prefetches == ()
    assert driver.planner.counters.missing_selections == 0


def test_without_a_selection_the_newest_resident_blocks_are_taken() -> None:
    driver = Driver()
    driver.prefill("a", 12)
    plan = driver.step(a=1)
    assert positions(plan, "a") == [0, 11, 12]
    assert plan.recalls == ()
    assert driver.planner.counters.missing_selections == 1


def test_later_selections_prefetch_while_the_best_old_blocks_stay() -> None:
    driver = Driver(num_slots=28, ratio=0.4)  # five blocks of thirteen
    driver.prefill("a", 12)
    driver.offer("a", 12, best=[3, 5, 7])
    assert positions(driver.step(a=1), "a") == [0, 3, 5, 7, 12]
    driver.prefill("b", 22, first_block=100, spare_blocks=0)
    driver.offer("a", 12, best=[9, 5, 10, 3])
    plan = driver.step(a=1, finished=["b"])
    # 9 and 10 are on their way; 3 ranks above 7, but two blocks are missing, so both fill in.
    assert plan.prefetches[0].blocks.tolist() == [10, 11]
    assert plan.recalls == ()
    assert positions(plan, "a") == [0, 3, 5, 7, 12]
    assert positions(driver.step(a=1), "a") == [0, 5, 9, 10, 12]
    assert driver.planner.counters.prefetched_blocks == 2


def test_resident_blocks_of_a_new_selection_join_at_once() -> None:
    driver = Driver()
    driver.prefill("a", 12)
    driver.step(a=1)
    driver.offer("a", 12, best=[6])
    plan = driver.step(a=1)
    assert positions(plan, "a") == [0, 6, 12]
    assert plan.prefetches == plan.recalls == ()


def test_leaving_blocks_give_way_when_slots_are_short() -> None:
    driver = Driver(num_slots=14, ratio=0.4)
    driver.prefill("a", 12)
    driver.offer("a", 12, best=[3, 5, 7])
    driver.step(a=1)
    driver.prefill("b", 8, first_block=100, spare_blocks=0)  # all 13 slots are taken, 5 by a and 8 by b
    driver.offer("a", 12, best=[9, 10, 11])
    plan = driver.step(a=1)
    assert plan.prefetches[0].blocks.tolist() == [10, 11, 12]
    assert positions(plan, "a") == [0, 12]
    assert positions(driver.step(a=1), "a") == [0, 9, 10, 11, 12]


def test_growth_drops_the_lowest_scored_block() -> None:
    driver = Driver(ratio=0.4)
    driver.prefill("a", 12)
    driver.offer("a", 12, best=[3, 5, 7])
    assert positions(driver.step(a=4), "a") == [0, 3, 5, 7, 12]
    # Block 12 has left the recent window; unscored, it ranks above all scored ones.
    plan = driver.step(a=1)
    assert positions(plan, "a") == [0, 3, 5, 12, 13]
    assert plan.recalls == plan.prefetches == ()


def test_a_row_without_changes_keeps_its_arrays() -> None:
    driver = Driver()
    driver.prefill("a", 12)
    first = driver.step(a=1).rows["a"]
    second = driver.step(a=1).rows["a"]
    assert second.slots is first.slots
    assert second.num_computed_tokens == 49
    with pytest.raises(ValueError, match="read-only"):
        second.slots[0][0] = 0


def test_turning_sparse_is_announced_one_step_ahead() -> None:
    driver = Driver(min_sparse=30)
    assert driver.prefill("a", 7).due == ()
    (due,) = driver.step(a=1).due
    assert (due.first, due.num_history_blocks) == (True, 7)
    driver.offer("a", 7, best=[2])
    plan = driver.step(a=1)
    assert positions(plan, "a") == [0, 2, 7]
    assert driver.planner.counters.missing_selections == 0


def test_requests_that_start_together_spread_out() -> None:
    driver = Driver(num_slots=100, tau=3)
    names = ["a", "b", "c", "d", "e"]
    for index, name in enumerate(names):
        driver.prefill(name, 10, first_block=1 + 20 * index)
    due = [tuple(one.req_id for one in driver.step(tokens=dict.fromkeys(names, 1)).due) for _ in range(11)]
    # Two of five in one step at most, and everybody once in three steps after the first round.
    assert due[:5] == [(), (), ("a", "b"), ("c", "d"), ("e",)]
    assert due[5:8] == due[8:11]
    assert sorted(name for step in due[5:8] for name in step) == names


def test_long_prefill_streams_what_is_not_resident() -> None:
    driver = Driver(num_slots=9)
    blocks = tuple(range(1, 13))
    driver.step([NewRequest("a", blocks, 0, 48)], a=20)
    plan = driver.step(a=20)
    row = plan.rows["a"]
    assert positions(plan, "a") == [5, 6, 7, 8, 9]
    assert row.streamed[0].tolist() == [1, 2, 3, 4, 5]
    assert row.evicted_tokens == (20,)
    assert plan.evicted == 2
    assert driver.planner.counters.streamed_blocks == 5


def test_dense_prefill_recalls_its_history_instead() -> None:
    driver = Driver(num_slots=20, ratio=1.0)
    driver.prefill("a", 8, spare_blocks=0)
    driver.step(finished=["a"])
    driver.prefill("b", 19, first_block=50, spare_blocks=0)
    driver.step(finished=["b"])
    plan = driver.step([NewRequest("c", tuple(range(1, 10)), 32, 34)], c=2)
    assert plan.recalls[0].blocks.tolist() == list(range(1, 9))
    assert positions(plan, "c") == list(range(9))
    assert plan.rows["c"].streamed[0].size == 0


def test_dense_prefill_streams_when_slots_are_short() -> None:
    driver = Driver(num_slots=10, ratio=1.0)
    driver.prefill("a", 8, spare_blocks=0)
    driver.step(finished=["a"])
    driver.prefill("b", 9, first_block=50, spare_blocks=0)
    driver.step(finished=["b"])
    driver.prefill("d", 3, first_block=70, spare_blocks=0)
    plan = driver.step([NewRequest("c", tuple(range(1, 10)), 32, 34)], c=2)
    assert positions(plan, "c") == [8]
    assert plan.rows["c"].streamed[0].tolist() == list(range(1, 9))


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_a_prefix_hit_on_blocks_written_in_the_same_step_reads_them_from_slots(ratio: float) -> None:
    driver = Driver(num_slots=8, ratio=ratio)
    first = NewRequest("a", (1, 2, 3), 0, 12)
    second = NewRequest("b", (1, 2, 4), 8, 12)
    plan = driver.step([second, first], b=4, a=12)
    assert positions(plan, "b") == [0, 1, 2]
    assert plan.rows["b"].slots[0].tolist() == driver.planner.lut[0, [1, 2, 4]].tolist()
    assert plan.rows["b"].streamed[0].size == 0
    assert sorted(plan.write_backs.blocks) == [1, 2, 3, 4]


def test_mixed_history_streams_the_host_part_only() -> None:
    driver = Driver(num_slots=8)
    driver.prefill("a", 3, spare_blocks=0)
    driver.step(finished=["a"])
    driver.prefill("b", 7, first_block=50, spare_blocks=0)
    driver.step(finished=["b"])
    first = NewRequest("c", (1, 2, 3, 4, 5), 12, 20)
    second = NewRequest("d", (1, 2, 3, 4, 6), 16, 20)
    plan = driver.step([first, second], c=8, d=4)
    assert positions(plan, "d") == [3, 4]
    assert plan.rows["d"].streamed[0].tolist() == [1, 2, 3]


def test_a_finished_request_leaves_its_full_blocks_as_cache() -> None:
    driver = Driver()
    driver.step([NewRequest("a", (1, 2, 3), 0, 10)], a=10)
    driver.step(finished=["a", "never seen"])
    usage = driver.planner.usage()
    assert (usage.num_requests, usage.slots_used, usage.slots_pinned, usage.host_blocks) == (0, 2, 0, 2)
    plan = driver.step([NewRequest("b", (1, 2, 9), 8, 10)], b=2)
    assert plan.recalls == ()
    assert positions(plan, "b") == [0, 1, 2]


def test_a_block_given_to_other_tokens_loses_its_old_content() -> None:
    driver = Driver()
    driver.prefill("a", 3, spare_blocks=0)
    driver.step(finished=["a"])
    driver.step([NewRequest("b", (2, 3), 0, 5)], b=5)
    assert driver.planner.usage().host_blocks == 2
    with pytest.raises(IntegrityError, match="neither a slot nor a valid host copy"):
        driver.step([NewRequest("c", (1, 3, 7), 8, 9)], finished=["b"], c=1)


def test_a_preempted_request_resumes_on_its_cached_blocks() -> None:
    driver = Driver()
    driver.prefill("a", 5)
    driver.step(a=3)
    driver.step(preempted=["a"])
    driver.offer("a", 5, best=[1])
    assert driver.planner.counters.ignored_selections == 1
    plan = driver.step([NewRequest("a", (1, 2, 3, 4, 5, 30), 20, 23)], a=3)
    assert plan.rows["a"].phase is Phase.PREFILL
    assert positions(plan, "a") == [0, 1, 2, 3, 4, 5]


def test_blocks_shared_with_a_running_request_are_not_evicted() -> None:
    driver = Driver(num_slots=10)
    driver.prefill("a", 4)
    driver.step([NewRequest("b", (1, 2, 3, 4, 20), 16, 17)], a=1, b=1)
    driver.step(finished=["b"])
    driver.prefill("c", 6, first_block=50, spare_blocks=0)
    assert (driver.planner.lut[0, [1, 4, 5]] > 0).all()


def test_what_one_request_returns_another_may_use_in_the_same_step() -> None:
    driver = Driver(num_slots=13)
    driver.prefill("a", 12)
    driver.offer("a", 12, best=[2])
    new = NewRequest("b", tuple(range(50, 59)), 0, 36)
    plan = driver.step([new], b=36, a=1)
    assert plan.evicted == 10
    assert positions(plan, "a") == [0, 2, 12]


def test_groups_choose_on_their_own() -> None:
    driver = Driver(num_groups=2)
    driver.prefill("a", 12)
    scores = np.zeros((2, 12), np.float32)
    scores[0, 3] = scores[1, 8] = 1.0
    scores[:, 5] = np.nan
    driver.planner.offer(Selection("a", scores))
    plan = driver.step(a=1)
    assert positions(plan, "a", 0) == [0, 3, 12]
    assert positions(plan, "a", 1) == [0, 8, 12]


def test_reset_forgets_everything() -> None:
    driver = Driver()
    driver.prefill("a", 12)
    lut = driver.planner.lut
    driver.planner.reset()
    driver.planner.check_integrity()
    assert (lut[0, 1:] == -1).all()
    assert driver.planner.usage().host_blocks == 0
    with pytest.raises(IntegrityError, match="not known"):
        driver.step(a=1)


def test_contradictions_are_refused() -> None:
    driver = Driver()
    driver.prefill("a", 3, spare_blocks=0)
    planner = driver.planner

    def step(*new: NewRequest, running: tuple[RunningRequest, ...] = (), **num_tokens: int) -> StepInput:
        return StepInput(9, (), (), new, running, num_tokens)

    with pytest.raises(IntegrityError, match="begins at token 11, the last one ended at 12"):
        planner.plan(step(running=(RunningRequest("a", (9,), 11),), a=1))
    with pytest.raises(UnsupportedError, match="prefix hit of 3 tokens"):
        planner.plan(step(NewRequest("b", (9,), 3, 4), b=1))
    with pytest.raises(IntegrityError, match="blocks 0 to 9 are given"):
        planner.plan(step(NewRequest("c", (9, 0), 0, 4), c=1))
    with pytest.raises(ConfigError, match="tau"):
        StepPlanner(planner.geometry, BudgetPolicy(BLOCK, 1.0, 0, 0, 0, 1, 1, 0), 0)


def test_tokens_without_blocks_are_refused() -> None:
    driver = Driver()
    driver.prefill("a", 3, spare_blocks=0)
    with pytest.raises(IntegrityError, match=r"12 \+ 1 tokens do not fit its 3 blocks"):
        driver.step(a=1)


def test_plans_complete_in_order() -> None:
    driver = Driver()
    empty = StepInput(1, (), (), (), (), {})
    first = driver.planner.plan(empty)
    with pytest.raises(IntegrityError, match="while step 1 is not complete"):
        driver.planner.plan(empty)
    driver.planner.complete(first)
    with pytest.raises(IntegrityError, match="open plan is none"):
        driver.planner.complete(first)


def test_a_decode_step_that_writes_more_than_the_budget_is_refused() -> None:
    driver = Driver()
    driver.prefill("a", 12)
    with pytest.raises(UnsupportedError, match="a decode step of 16 tokens"):
        driver.step(a=16)


def test_scores_of_the_wrong_shape_are_refused() -> None:
    driver = Driver()
    driver.prefill("a", 12)
    with pytest.raises(IntegrityError, match=r"shape \(1, 13\)"):
        driver.planner.offer(Selection("a", np.zeros((1, 13), np.float32)))
