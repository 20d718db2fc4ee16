"""merge_attention: empty parts (also with NaN in their buffers) and extreme log-sum-exps."""

import pytest
import torch
from flashmemory_kernels.merge_attention import merge_attention
from flashmemory_kernels.merge_attention.cases import CASES, MergeCase

# One exp and one division per element: a few float32 roundings (eps 1.2e-7).
RTOL_FP32 = 2e-6


def random_part(case: MergeCase, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(case, generator=generator)
    return out, torch.randn(case.num_heads, case.num_tokens, generator=generator) * 5


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_union(case: MergeCase) -> None:
    out_a, lse_a = random_part(case, 0)
    out_b, lse_b = random_part(case, 1)
    out, lse = merge_attention(out_a, lse_a, out_b, lse_b)
    mass_a, mass_b = lse_a.double().exp(), lse_b.double().exp()
    share = (mass_a / (mass_a + mass_b)).T.unsqueeze(-1)
    torch.testing.assert_close(out.double(), share * out_a + (1 - share) * out_b, rtol=RTOL_FP32, atol=RTOL_FP32)
    torch.testing.assert_close(lse.double(), (mass_a + mass_b).log(), rtol=RTOL_FP32, atol=RTOL_FP32)


@pytest.mark.parametrize("empty", [-torch.inf, torch.inf])
@pytest.mark.parametrize("case", CASES)
def test_empty_part_is_neutral_whatever_its_buffer_holds(case: MergeCase, empty: float) -> None:
    out_a, lse_a = random_part(case, 0)
    poison, nothing = torch.full_like(out_a, torch.nan), torch.full_like(lse_a, empty)
    for merged in (
        merge_attention(out_a, lse_a, poison, nothing),
        merge_attention(poison, nothing, out_a, lse_a),
    ):
        assert torch.equal(merged[0], out_a)
        assert torch.equal(merged[1], lse_a)


@pytest.mark.parametrize("case", CASES)
def test_two_empty_parts_give_zero(case: MergeCase) -> None:
    poison = torch.full(case, torch.nan)
    nothing = torch.full((case.num_heads, case.num_tokens), -torch.inf)
    out, lse = merge_attention(poison, nothing, poison, nothing)
    assert torch.equal(out, torch.zeros_like(poison))
    assert torch.equal(lse, nothing)


def test_huge_log_sum_exps_do_not_overflow() -> None:
    out_a, out_b = torch.ones(1, 1, 4), torch.zeros(1, 1, 4)
    big = torch.full((1, 1), 3e4)
    out, lse = merge_attention(out_a, big, out_b, big)
    assert torch.equal(out, torch.full_like(out, 0.5))
    torch.testing.assert_close(lse, big + torch.log(torch.tensor(2.0)))


def test_result_keeps_the_dtype_of_the_first_part() -> None:
    out_a, lse_a = random_part(CASES[1], 0)
    out_b, lse_b = random_part(CASES[1], 1)
    assert merge_attention(out_a, lse_a, out_b.bfloat16(), lse_b)[0].dtype == torch.float32
    assert merge_attention(out_a.bfloat16(), lse_a, out_b, lse_b)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("case", CASES)
def test_result_may_take_the_place_of_the_first_part(case: MergeCase) -> None:
    (out_a, lse_a), (out_b, lse_b) = random_part(case, 0), random_part(case, 1)
    expected, expected_lse = merge_attention(out_a, lse_a, out_b, lse_b)
    merged, lse = merge_attention(out_a, lse_a, out_b, lse_b, out_a, lse_a)
    assert (merged is out_a, lse is lse_a) == (True, True)
    assert torch.equal(out_a, expected)
    assert torch.equal(lse_a, expected_lse)


def test_sum_is_rounded_once_to_the_dtype_of_the_place_it_goes_to() -> None:
    (out_a, lse_a), (out_b, lse_b) = random_part(CASES[2], 0), random_part(CASES[2], 1)
    out_a, out_b = out_a.bfloat16(), out_b.bfloat16()
    exact, _ = merge_attention(out_a.float(), lse_a, out_b, lse_b)
    wide, _ = merge_attention(out_a, lse_a, out_b, lse_b, torch.empty_like(exact))
    assert torch.equal(wide, exact)
    # A slice of wider rows: what lies beside it stays.
    rows = torch.full((*exact.shape[:2], exact.shape[2] + 1), torch.nan, dtype=torch.bfloat16)
    merge_attention(out_a.float(), lse_a, out_b, lse_b, rows[..., :-1])
    assert torch.equal(rows[..., :-1], exact.bfloat16())
    assert bool(rows[..., -1].isnan().all())


def test_wrong_shape_and_dtype_are_named() -> None:
    out, lse = random_part(CASES[1], 0)
    with pytest.raises(ValueError, match=r"lse_b: expected shape \[3, 7\], got \[7, 3\]"):
        merge_attention(out, lse, out, lse.T)
    with pytest.raises(ValueError, match=r"lse_a: expected dtype torch.float32, got torch.float64"):
        merge_attention(out, lse.double(), out, lse)
    with pytest.raises(ValueError, match=r"out: expected shape \[7, 3, 20\], got \[3, 7, 20\]"):
        merge_attention(out, lse, out, lse, out.transpose(0, 1))
