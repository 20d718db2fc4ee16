"""Sizing: the plan spends at most what it was given, and always holds one request of the longest length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.runtime.capacity import (
    BesideSlots,
    CapacityPlan,
    MemoryBudget,
    Staging,
    plan_automatic,
    plan_capacity,
)

BLOCK_BYTES = 1000


def budget(**changes: float) -> BudgetPolicy:
    values: dict[str, float] = {
        "block_size": 16,
        "resident_ratio": 0.135,
        "min_sparse_tokens": 512,
        "sink_tokens": 16,
        "recent_tokens": 64,
        "max_num_batched_tokens": 1024,
        "max_model_len": 32768,
        "growth_reserve_tokens": 128,
    }
    return BudgetPolicy(**(values | changes))  # type: ignore[arg-type]


def plan(
    device_blocks: int,
    host_blocks: int,
    *,
    slots: int | None = None,
    index: int = 0,
    sums: int = 0,
    questions: int = 0,
    tables: int = 0,
    seqs: int = 8,
) -> CapacityPlan:
    memory = MemoryBudget(device_blocks * BLOCK_BYTES, host_blocks * BLOCK_BYTES, slots, seqs)
    return plan_capacity(memory, budget(), BLOCK_BYTES, BesideSlots(index, sums, questions, tables, Staging(1, 0)))


def test_host_memory_sets_the_logical_blocks() -> None:
    assert plan(400, 5000).num_logical_blocks == 5000


def test_no_more_logical_blocks_than_the_requests_can_fill() -> None:
    assert plan(400, 10**9, seqs=2).num_logical_blocks == 2 * 2048 + 1


def test_a_32k_request_is_seven_times_the_device() -> None:
    made = plan(290, 5000)
    assert made.num_slots == 290
    assert 7 * made.num_slots <= 2048


@pytest.mark.parametrize(
    ("device_blocks", "host_blocks", "option"),
    [(100, 5000, "--kv-cache-memory-bytes"), (400, 2048, "host_memory_gib")],
)
def test_what_cannot_hold_one_request_is_refused(device_blocks: int, host_blocks: int, option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        plan(device_blocks, host_blocks)


def test_too_few_explicit_slots_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"flashmemory\.device_slots: 50 makes 50 slots"):
        plan(10**6, 5000, slots=50)


def test_more_explicit_slots_than_the_device_holds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"flashmemory\.device_slots: 500 is more than the 400 "):
        plan(400, 5000, slots=500)


def test_logical_blocks_give_way_to_slots_when_index_keys_are_large() -> None:
    made = plan(800, 10**6, index=100)
    assert made.num_logical_blocks < 8 * 2048 + 1
    assert made.num_slots - 1 >= made.request_slots


def test_checksums_alone_do_not_tie_the_blocks_to_the_slots() -> None:
    assert plan(400, 5000, sums=1).num_logical_blocks == 5000
    assert plan(400, 5000, sums=1).num_slots == 395


def test_questions_take_slots() -> None:
    assert plan(400, 5000, questions=10 * BLOCK_BYTES).num_slots == 390


def test_slots_are_the_resident_share_of_the_blocks_that_have_index_keys() -> None:
    made = plan(2000, 10**6, index=100)
    assert made.num_slots == pytest.approx(0.135 * made.num_logical_blocks, abs=1)


@given(
    device_blocks=st.integers(1, 5000),
    host_blocks=st.integers(1, 20000),
    index=st.integers(0, 500),
    sums=st.integers(0, 50),
    questions=st.integers(0, 100 * BLOCK_BYTES),
    tables=st.integers(0, 10 * BLOCK_BYTES),
    seqs=st.integers(1, 64),
    slots=st.none() | st.integers(2, 5000),
)
def test_a_plan_never_spends_more_than_it_has(
    device_blocks: int,
    host_blocks: int,
    index: int,
    sums: int,
    questions: int,
    tables: int,
    seqs: int,
    slots: int | None,
) -> None:
    beside = {"index": index, "sums": sums, "questions": questions, "tables": tables}
    try:
        made = plan(device_blocks, host_blocks, slots=slots, seqs=seqs, **beside)
    except ConfigError:
        return
    num_bytes = made.num_logical_blocks * (index + sums) + questions + tables
    assert made.index_bytes + made.checksum_bytes + made.beside.fixed_bytes == num_bytes
    assert made.slot_bytes + num_bytes <= device_blocks * BLOCK_BYTES
    assert made.host_bytes <= host_blocks * BLOCK_BYTES
    assert made.request_slots < made.num_slots <= made.num_logical_blocks


def automatic(device_blocks: int, host_blocks: int, max_model_len: int = 32768) -> CapacityPlan:
    memory = MemoryBudget(device_blocks * BLOCK_BYTES, host_blocks * BLOCK_BYTES, None, 8)
    policy = budget(max_num_batched_tokens=256, max_model_len=max_model_len)
    return plan_automatic(memory, policy, BLOCK_BYTES, BesideSlots(0, 0, 0, 0, Staging(1, 0)))


@pytest.mark.parametrize(("device_blocks", "host_blocks", "longest"), [(400, 1001, 16000), (100, 5000, 11728)])
def test_an_automatic_length_that_does_not_fit_tells_which_does(
    device_blocks: int, host_blocks: int, longest: int
) -> None:
    with pytest.raises(
        ConfigError, match=rf"^--max-model-len: auto is .* 32768 tokens, allowed: .* at most {longest} "
    ):
        automatic(device_blocks, host_blocks)
    automatic(device_blocks, host_blocks, longest)
    with pytest.raises(ConfigError):
        automatic(device_blocks, host_blocks, longest + 1)


@pytest.mark.parametrize(("device_blocks", "host_blocks"), [(400, 1), (1, 5000)])
def test_an_automatic_length_that_no_number_helps(device_blocks: int, host_blocks: int) -> None:
    with pytest.raises(ConfigError, match=r"^(?!.*auto)"):
        automatic(device_blocks, host_blocks)
