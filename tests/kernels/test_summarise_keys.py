"""summarise_keys: mean formed in float32, bounds exact in low precision, strided keys."""

import pytest
import torch
from flashmemory_kernels.summarise_keys import summarise_keys
from flashmemory_kernels.summarise_keys.cases import CASES, SummaryCase

# The mean is formed in float32 (absolute error of a few eps of its largest term, about 4) and rounded once to
# the key dtype: relative 2^-9 in bf16.
ATOL_FP32_SUM = 1e-6
RTOL = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


def random_keys(case: SummaryCase, dtype: torch.dtype) -> torch.Tensor:
    """[n, Hkv, T, D], a transposed view of [n, T, Hkv, D]."""
    keys = torch.randn(
        case.num_blocks,
        case.block_size,
        case.num_kv_heads,
        case.head_dim,
        generator=torch.Generator().manual_seed(0),
    )
    return keys.to(dtype).transpose(1, 2)


@pytest.mark.parametrize("dtype", list(RTOL))
@pytest.mark.parametrize("case", CASES)
def test_mean(case: SummaryCase, dtype: torch.dtype) -> None:
    keys = random_keys(case, dtype)
    mean = summarise_keys(keys, "mean")
    assert mean.dtype == dtype
    expected = keys.double().sum(2, keepdim=True) / case.block_size
    torch.testing.assert_close(mean.double(), expected, rtol=RTOL[dtype], atol=ATOL_FP32_SUM)


@pytest.mark.parametrize("dtype", list(RTOL))
@pytest.mark.parametrize("case", CASES)
def test_bounds_are_attained_and_hold(case: SummaryCase, dtype: torch.dtype) -> None:
    keys = random_keys(case, dtype)
    bounds = summarise_keys(keys, "bounds")
    assert bounds.shape == (case.num_blocks, case.num_kv_heads, 2, case.head_dim)
    low, high = bounds[:, :, :1], bounds[:, :, 1:]
    assert bool(((keys >= low) & (keys <= high)).all())
    assert bool((keys == low).any(2).all())
    assert bool((keys == high).any(2).all())


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="keys: expected at least one token"):
        summarise_keys(torch.zeros(1, 1, 0, 4), "mean")
    with pytest.raises(ValueError, match=r"kind: expected one of \['bounds', 'mean'\], got 'sum'"):
        summarise_keys(torch.zeros(1, 1, 2, 4), "sum")  # type: ignore[arg-type]
