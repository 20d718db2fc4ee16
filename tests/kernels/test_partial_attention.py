"""partial_attention: fast CPU path against the specification, the specification against float64."""

from typing import Any

import pytest
import torch
from flashmemory_kernels.merge_attention import merge_attention
from flashmemory_kernels.partial_attention import partial_attention
from flashmemory_kernels.partial_attention.cases import CASES, AttentionCase
from flashmemory_kernels.partial_attention.naive import partial_attention_naive

# Logits reach 15, where float32 is spaced 1e-6 apart: that absolute error in the exponent is a relative one
# in each weight, and sums over K <= 513 keys add a little.
TOL_FP32: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
# In bf16 torch's blocked kernel uses a faster, coarser exp also for its float32 sums.
TOL_LSE_BF16: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-4}
# bf16 keeps 8 bits of the output, and the blocked kernel also rounds its weights to bf16.
TOL_BF16: dict[str, Any] = {"rtol": 2e-2, "atol": 2e-2}


def inputs(case: AttentionCase, dtype: torch.dtype, num_keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(case.num_tokens, case.num_heads, case.head_dim, generator=generator)
    key, value = torch.randn(2, num_keys, case.num_kv_heads, case.head_dim, generator=generator)
    return query.to(dtype), key.to(dtype), value[..., : case.value_dim or case.head_dim].to(dtype)


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    """Textbook attention in float64, [T, H, D]."""
    repeat = query.shape[1] // key.shape[1]
    keys, values = (x.double().repeat_interleave(repeat, dim=1) for x in (key, value))
    logits = torch.einsum("thd,shd->hts", query.double(), keys) * scale
    if causal:
        logits += torch.full(logits.shape[1:], -torch.inf, dtype=torch.float64).triu(1)
    return torch.einsum("hts,shd->thd", logits.softmax(-1), values)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_specification_is_dense_attention(case: AttentionCase, causal: bool) -> None:
    query, key, value = inputs(case, torch.float32, case.num_tokens if causal else case.num_keys)
    out, _ = partial_attention_naive(query, key[None], value[None], None, len(key), 0.2, causal)
    torch.testing.assert_close(out.double(), dense(query, key, value, 0.2, causal), **TOL_FP32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, TOL_FP32), (torch.bfloat16, TOL_BF16)])
@pytest.mark.parametrize("case", CASES)
def test_cpu_path_matches_specification(
    case: AttentionCase, dtype: torch.dtype, tolerance: dict[str, Any], causal: bool
) -> None:
    query, key, value = inputs(case, dtype, case.num_tokens if causal else case.num_keys)
    run = (key[None], value[None], None, len(key))
    out, lse = partial_attention(query, *run, 0.2, causal)
    expected_out, expected_lse = partial_attention_naive(query, *run, 0.2, causal)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out, expected_out, **tolerance)
    torch.testing.assert_close(lse, expected_lse, **(TOL_FP32 if dtype == torch.float32 else TOL_LSE_BF16))


@pytest.mark.parametrize("attend", [partial_attention, partial_attention_naive])
@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("case", CASES)
def test_pages_are_read_in_the_order_of_the_table(case: AttentionCase, block_size: int, attend: Any) -> None:
    """Interleaved, shuffled pages with NaN in every page and token that is not meant."""
    query, key, value = inputs(case, torch.float32, case.num_keys)
    expected = attend(query, key[None], value[None], None, case.num_keys, 0.2, False)
    num_pages = -(-case.num_keys // block_size)
    tokens = torch.full((num_pages * block_size, case.num_kv_heads, case.head_dim + value.shape[-1]), torch.nan)
    tokens[: case.num_keys] = torch.cat((key, value), dim=-1)
    in_order = tokens.view(num_pages, block_size, case.num_kv_heads, -1)
    pages = torch.full((num_pages + 3, *in_order.shape[1:]), torch.nan)
    table = torch.randperm(num_pages + 3, generator=torch.Generator().manual_seed(1))[:num_pages].int()
    pages[table.long()] = in_order
    for given, order in ((pages, table), (in_order, None)):
        keys, values = given[..., : case.head_dim], given[..., case.head_dim :]
        got = attend(query, keys, values, order, case.num_keys, 0.2, False)
        # A layout may take another path through the processor's matrix library, which may round differently
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_keys_with_the_head_dim_outside_are_read_right() -> None:
    query, key, value = inputs(CASES[1], torch.float32, 50)
    expected = partial_attention(query, key[None], value[None], None, 50, 0.2)
    transposed = key.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    got = partial_attention(query, transposed[None], value[None], None, 50, 0.2)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_parts_merge_into_the_whole() -> None:
    query, key, value = inputs(CASES[-1], torch.float32, 513)
    whole, whole_lse = partial_attention(query, key[None], value[None], None, 513, 0.2)
    left = partial_attention(query, key[None], value[None], None, 200, 0.2)
    right = partial_attention(query, key[None, 200:], value[None, 200:], None, 313, 0.2)
    out, lse = merge_attention(*left, *right)
    torch.testing.assert_close(out, whole, **TOL_FP32)
    torch.testing.assert_close(lse, whole_lse, **TOL_FP32)


def test_no_keys_is_an_empty_part() -> None:
    query, key, value = inputs(CASES[1], torch.float32, 0)
    out, lse = partial_attention(query, key[None], value[None], None, 0, 0.2)
    assert torch.equal(out, torch.zeros_like(query))
    assert torch.equal(lse, torch.full((6, 7), -torch.inf))


def test_wrong_arguments_are_named() -> None:
    query, key, value = inputs(CASES[1], torch.float32, 50)
    keys, values = key[None], value[None]
    with pytest.raises(ValueError, match=r"num_tokens: expected 7, one key for each causal query, got 50"):
        partial_attention(query, keys, values, None, 50, 0.2, causal=True)
    with pytest.raises(ValueError, match=r"num_tokens: expected at most 1 pages of 50, got 51"):
        partial_attention(query, keys, values, None, 51, 0.2)
    with pytest.raises(ValueError, match=r"num_tokens: expected at most 0 pages of 50, got 1"):
        partial_attention(query, keys, values, torch.empty(0, dtype=torch.int32), 1, 0.2)
    with pytest.raises(ValueError, match=r"block_table: expected dtype torch.int32, got torch.int64"):
        partial_attention(query, keys, values, torch.zeros(1, dtype=torch.int64), 50, 0.2)
    with pytest.raises(ValueError, match=r"key_pages: expected a number of heads that divides 5, got 2"):
        partial_attention(query[:, :5], keys, values, None, 50, 0.2)
    with pytest.raises(ValueError, match=r"value_pages: expected at most 20 elements, as a key has, got 40"):
        partial_attention(query, keys, torch.cat((values, values), dim=-1), None, 50, 0.2)
    with pytest.raises(ValueError, match=r"value_pages: expected dtype torch.float32, got torch.bfloat16"):
        partial_attention(query, keys, values.bfloat16(), None, 50, 0.2)
