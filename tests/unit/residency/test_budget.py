"""Budgets: the reserve covers every later use."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.residency.budget import BudgetPolicy, cdiv


def make_policy(**changes: float) -> BudgetPolicy:
    values: dict[str, float] = {
        "block_size": 16,
        "resident_ratio": 0.135,
        "min_sparse_tokens": 2048,
        "sink_tokens": 64,
        "recent_tokens": 256,
        "max_num_batched_tokens": 8192,
        "max_model_len": 131072,
        "growth_reserve_tokens": 512,
    }
    return BudgetPolicy(**{**values, **changes})  # type: ignore[arg-type]


@st.composite
def policies(draw: st.DrawFn) -> BudgetPolicy:
    block_size = draw(st.integers(1, 5))
    return BudgetPolicy(
        block_size=block_size,
        resident_ratio=draw(st.floats(0.01, 1.0)),
        min_sparse_tokens=draw(st.integers(0, 80)),
        sink_tokens=draw(st.integers(0, 20)),
        recent_tokens=draw(st.integers(0, 40)),
        max_num_batched_tokens=draw(st.integers(1, 60)),
        max_model_len=draw(st.integers(1, 120)),
        growth_reserve_tokens=draw(st.integers(0, 60)),
    )


def test_default_numbers() -> None:
    policy = make_policy()
    assert policy.decode_budget(2047) == 128
    assert policy.decode_budget(2048) == 17
    assert policy.decode_budget(131072) == 1105
    assert (policy.sink_blocks(131072), policy.recent_blocks(131072)) == (4, 16)
    assert policy.recent_blocks(2048) == 4
    assert policy.worst_case() == 1106
    # A prompt of 4,096 tokens: its chunks need more than its decode.
    assert policy.reserve(4096, 4096) == 288
    assert policy.reserve(4097, 4096) == policy.most_held(4097 + 512) == 40


def test_a_chunk_that_begins_within_a_block_has_a_slot_more() -> None:
    # 32 tokens from token 40 on lie in three blocks of 16
    policy = make_policy(max_num_batched_tokens=32, min_sparse_tokens=0, sink_tokens=0, resident_ratio=0.01)
    assert policy.need(72, prefill_end=160) == 3


def test_ratio_one_is_dense_at_any_length() -> None:
    policy = make_policy(resident_ratio=1.0)
    assert policy.is_dense(10**6)
    assert policy.decode_budget(131072) == 8192


@given(policies(), st.integers(1, 200))
def test_forced_blocks_fit_the_budget(policy: BudgetPolicy, num_tokens: int) -> None:
    num_blocks, budget = cdiv(num_tokens, policy.block_size), policy.decode_budget(num_tokens)
    sink, recent = policy.sink_blocks(num_tokens), policy.recent_blocks(num_tokens)
    assert recent >= 1
    assert min(sink + max(recent, min(2, num_blocks)), num_blocks) <= budget <= num_blocks
    assert policy.keeps_all(num_tokens) == (budget == num_blocks)


@given(policies(), st.lists(st.integers(1, 200), min_size=1))
def test_many_lengths_at_once_have_what_each_has_alone(policy: BudgetPolicy, lengths: list[int]) -> None:
    frames = policy.frames(np.array(lengths, np.int32))
    for of_all, of_one in (
        (frames.budget, policy.decode_budget), (frames.sink, policy.sink_blocks), (frames.recent, policy.recent_blocks),
    ):  # fmt: skip
        assert of_all.dtype == np.int32
        assert of_all.tolist() == [of_one(length) for length in lengths]


@given(policies(), st.integers(1, 200))
def test_what_keeps_all_blocks_does_so_as_long_as_is_said(policy: BudgetPolicy, num_tokens: int) -> None:
    if policy.keeps_all(num_tokens):
        until = min(policy.keeps_all_until(num_tokens), 400)
        assert until >= num_tokens
        assert all(policy.keeps_all(length) for length in range(num_tokens, until + 1))


@given(policies(), st.integers(1, 200))
def test_recent_window_never_moves_back(policy: BudgetPolicy, num_tokens: int) -> None:
    def start(tokens: int) -> int:
        return cdiv(tokens, policy.block_size) - policy.recent_blocks(tokens)

    if not policy.keeps_all(num_tokens):
        assert start(num_tokens) <= start(num_tokens + 1)


@given(policies(), st.data())
def test_reserve_covers_all_growth_it_reserves_for(policy: BudgetPolicy, data: st.DataObject) -> None:
    prefill_end = data.draw(st.integers(1, policy.max_model_len))
    num_tokens = data.draw(st.integers(1, policy.max_model_len))
    reserve = policy.reserve(num_tokens, prefill_end)
    now = max(num_tokens, prefill_end)
    later = min(now + policy.growth_reserve_tokens, policy.max_model_len)
    for length in range(now, later + 1):
        assert policy.decode_budget(length) <= reserve
    if num_tokens <= prefill_end:
        most_written = max(
            cdiv(min(start + policy.max_num_batched_tokens, prefill_end), policy.block_size)
            - start // policy.block_size
            for start in range(prefill_end)
        )
        assert most_written <= reserve
    assert reserve <= policy.worst_case()


@given(policies())
def test_worst_case_is_reached(policy: BudgetPolicy) -> None:
    lengths = range(1, policy.max_model_len + 1)
    prefill = max(policy.reserve(length, length) for length in lengths)
    decode = max(policy.reserve(length, 0) for length in lengths)
    assert policy.worst_case() == max(prefill, decode)


@pytest.mark.parametrize(
    "change", [{"resident_ratio": 0.0}, {"resident_ratio": 1.1}, {"block_size": 0}, {"sink_tokens": -1}]
)
def test_values_out_of_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        make_policy(**change)
