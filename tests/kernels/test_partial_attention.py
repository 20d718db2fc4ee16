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
    return query.to(dtype), key.to(dtype), value.to(dtype)


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
    out, _ = partial_attention_naive(query, key, value, 0.2, causal)
    torch.testing.assert_close(out.double(), dense(query, key, value, 0.2, causal), **TOL_FP32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, TOL_FP32), (torch.bfloat16, TOL_BF16)])
@pytest.mark.parametrize("case", CASES)
def test_cpu_path_matches_specification(
    case: AttentionCase, dtype: torch.dtype, tolerance: dict[str, Any], causal: bool
) -> None:
    query, key, value = inputs(case, dtype, case.num_tokens if causal else case.num_keys)
    out, lse = partial_attention(query, key, value, 0.2, causal)
    expected_out, expected_lse = partial_attention_naive(query, key, value, 0.2, causal)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out, expected_out, **tolerance)
    torch.testing.assert_close(lse, expected_lse, **(TOL_FP32 if dtype == torch.float32 else TOL_LSE_BF16))


def test_strided_and_transposed_keys_are_read_right() -> None:
    """A page format may hand over views: interleaved with values, or with D not innermost."""
    query, key, value = inputs(CASES[1], torch.float32, 50)
    expected = partial_attention(query, key, value, 0.2)
    interleaved = torch.cat((key, value), dim=-1)
    got = partial_attention(query, interleaved[..., :20], interleaved[..., 20:], 0.2)
    assert torch.equal(got[0], expected[0])
    transposed = key.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(partial_attention(query, transposed, value, 0.2)[0], expected[0])


def test_parts_merge_into_the_whole() -> None:
    query, key, value = inputs(CASES[4], torch.float32, 513)
    whole, whole_lse = partial_attention(query, key, value, 0.2)
    left = partial_attention(query, key[:200], value[:200], 0.2)
    right = partial_attention(query, key[200:], value[200:], 0.2)
    out, lse = merge_attention(*left, *right)
    torch.testing.assert_close(out, whole, **TOL_FP32)
    torch.testing.assert_close(lse, whole_lse, **TOL_FP32)


def test_no_keys_is_an_empty_part() -> None:
    query, key, value = inputs(CASES[1], torch.float32, 0)
    out, lse = partial_attention(query, key, value, 0.2)
    assert torch.equal(out, torch.zeros_like(query))
    assert torch.equal(lse, torch.full((6, 7), -torch.inf))


def test_wrong_arguments_are_named() -> None:
    query, key, value = inputs(CASES[1], torch.float32, 50)
    with pytest.raises(ValueError, match=r"key: expected shape \[7, \*, 20\], got \[50, 2, 20\]"):
        partial_attention(query, key, value, 0.2, causal=True)
    with pytest.raises(ValueError, match=r"key: expected a number of heads that divides 5, got 2"):
        partial_attention(query[:, :5], key, value, 0.2)
    with pytest.raises(ValueError, match=r"value: expected dtype torch.float32, got torch.bfloat16"):
        partial_attention(query, key, value.bfloat16(), 0.2)
