"""Who keeps all blocks: with `pressure` whoever comes while there is room, and again only well below the limit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.residency.ledger import SlotLedger
from flashmemory_vllm.residency.modes import Modes, reason
from flashmemory_vllm.residency.planner import StepPlanner
from flashmemory_vllm.residency.types import Geometry, NewRequest, StepInput

BLOCK = 4
# Dense requests reserve their blocks, sparse ones a tenth of them but never fewer than 3; chunks of 4 blocks.
PRESSURE = BudgetPolicy(BLOCK, 0.1, 0, BLOCK, BLOCK, 3 * BLOCK, 100 * BLOCK, 0, "pressure")
ALWAYS = replace(PRESSURE, mode="always")
NUM_SLOTS = 101


@dataclass(frozen=True)
class Running:
    policy: BudgetPolicy
    num_tokens: int
    prefill_len: int


def is_dense(policy: BudgetPolicy) -> bool:
    return policy.keeps_all(100 * BLOCK)


def running(num_blocks: int) -> Running:
    """A dense request that decodes."""
    return Running(replace(PRESSURE, resident_ratio=1.0), num_blocks * BLOCK, num_blocks * BLOCK - 1)


def test_always_is_never_dense_for_lack_of_pressure() -> None:
    modes = Modes(ALWAYS, NUM_SLOTS)
    assert modes.preview(BLOCK * 20, []) is modes.choose(BLOCK * 20, []) is ALWAYS


def test_a_request_is_dense_up_to_the_high_watermark() -> None:
    assert is_dense(Modes(PRESSURE, NUM_SLOTS).choose(90 * BLOCK, []))
    assert not is_dense(Modes(PRESSURE, NUM_SLOTS).choose(90 * BLOCK + 1, []))
    assert is_dense(Modes(PRESSURE, NUM_SLOTS).choose(50 * BLOCK, [running(40)]))
    assert not is_dense(Modes(PRESSURE, NUM_SLOTS).choose(50 * BLOCK, [running(41)]))


def test_pressure_ends_at_the_low_watermark() -> None:
    modes = Modes(PRESSURE, NUM_SLOTS)
    others = [running(70), running(20)]
    assert not is_dense(modes.choose(10 * BLOCK, others))
    assert not is_dense(modes.choose(5 * BLOCK, [running(71)]))
    assert is_dense(modes.choose(5 * BLOCK, [running(70)]))
    assert is_dense(modes.choose(5 * BLOCK, [running(71)]))


def test_a_preview_changes_nothing() -> None:
    modes = Modes(PRESSURE, NUM_SLOTS)
    assert not is_dense(modes.preview(20 * BLOCK, [running(80)]))
    assert is_dense(modes.choose(5 * BLOCK, [running(80)]))


def test_without_requests_nothing_of_the_past_counts() -> None:
    pressed, fresh = Modes(PRESSURE, NUM_SLOTS), Modes(PRESSURE, NUM_SLOTS)
    assert not is_dense(pressed.choose(95 * BLOCK, []))
    for num_blocks in (90, 91):
        assert pressed.preview(num_blocks * BLOCK, []) == fresh.preview(num_blocks * BLOCK, [])


def test_the_ledger_admits_dense_requests_first_and_sparse_ones_then() -> None:
    ledger = SlotLedger(NUM_SLOTS, PRESSURE)
    for name, num_blocks in (("a", 50), ("b", 40), ("c", 50)):
        tokens = num_blocks * BLOCK
        assert ledger.can_admit(name, tokens, tokens)
        ledger.commit(name, tokens, tokens)
    assert [is_dense(ledger.policy_of(name)) for name in "abc"] == [True, True, False]
    assert ledger.reserved == 50 + 40 + 6
    ledger.check_integrity()


def test_a_dense_request_that_outgrows_the_slots_comes_back_sparse() -> None:
    ledger = SlotLedger(NUM_SLOTS, replace(PRESSURE, max_model_len=200 * BLOCK))
    ledger.commit("a", 90 * BLOCK, 90 * BLOCK)
    assert is_dense(ledger.policy_of("a"))
    assert ledger.can_admit("a", 100 * BLOCK, 90 * BLOCK)
    assert not ledger.can_admit("a", 100 * BLOCK + 1, 90 * BLOCK)
    ledger.release("a")
    assert ledger.can_admit("a", 100 * BLOCK + 1, 100 * BLOCK + 1)
    ledger.commit("a", 100 * BLOCK + 1, 100 * BLOCK + 1)
    assert not is_dense(ledger.policy_of("a"))


def test_the_planner_keeps_all_blocks_of_a_dense_request() -> None:
    planner = StepPlanner(Geometry(300, NUM_SLOTS, 1, BLOCK), PRESSURE, tau=4)
    new = (
        NewRequest("a", tuple(range(1, 52)), 0, 50 * BLOCK),
        NewRequest("b", tuple(range(60, 120)), 0, 55 * BLOCK),
    )
    # In the order of the scheduled tokens, which is the order of admission: b comes first.
    plan = planner.plan(StepInput(1, (), (), new, (), {"b": 3 * BLOCK, "a": 3 * BLOCK}))
    planner.check_integrity()
    planner.complete(plan)
    states = {state.req_id: state for state in planner._requests}
    assert (is_dense(states["a"].policy), is_dense(states["b"].policy)) == (False, True)


def test_requests_of_one_step_are_judged_one_after_the_other() -> None:
    """By scheduler and worker alike: who comes later, and the request itself, does not count."""
    planner, ledger = StepPlanner(Geometry(300, NUM_SLOTS, 1, BLOCK), PRESSURE, tau=4), SlotLedger(NUM_SLOTS, PRESSURE)
    new = (NewRequest("a", tuple(range(1, 52)), 0, 50 * BLOCK), NewRequest("b", tuple(range(60, 150)), 0, 84 * BLOCK))
    planner.plan(StepInput(1, (), (), new, (), {"b": BLOCK, "a": BLOCK}))
    for name, num_blocks in (("b", 84), ("a", 50)):
        ledger.commit(name, BLOCK, num_blocks * BLOCK)
        state = planner.requests.get(name)
        assert state is not None
        assert state.policy == ledger.policy_of(name)
    assert is_dense(ledger.policy_of("b"))
    assert not is_dense(ledger.policy_of("a"))


@pytest.mark.parametrize(
    ("policy", "prefill_len", "expected"),
    [
        (ALWAYS, 400, "sparse"),
        (replace(ALWAYS, min_sparse_tokens=401), 400, "below_min_sparse_tokens"),
        (ALWAYS, 3 * BLOCK, "ratio_keeps_all"),
        (replace(PRESSURE, resident_ratio=1.0), 400, "mode_pressure"),
    ],
)
def test_the_reason_is_told(policy: BudgetPolicy, prefill_len: int, expected: str) -> None:
    assert reason(policy, prefill_len, ratio=0.1) == expected


def test_a_ratio_of_one_is_the_reason_in_any_mode() -> None:
    dense = replace(PRESSURE, resident_ratio=1.0)
    assert reason(Modes(dense, NUM_SLOTS).choose(400, []), 400, ratio=1.0) == "ratio_keeps_all"
