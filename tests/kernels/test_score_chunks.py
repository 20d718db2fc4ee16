"""score_chunks: gated sums against the definition in float64, and the fp8 rows it reads."""

from typing import Any

import pytest
import torch
from flashmemory_kernels.score_chunks import dequantise_codes, quantise_codes, score_chunks
from flashmemory_kernels.score_chunks.cases import CASES, ChunkCase, make_inputs
from flashmemory_kernels.score_chunks.naive import score_chunks_naive
from hypothesis import given
from hypothesis import strategies as st

# Sums of at most 16 heads of 128 products in float32.
TOL_FP32: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_heads_are_rectified_then_gated_and_placed(case: ChunkCase, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    rows = dequantise_codes(inputs.codes, inputs.scales)[:, inputs.block_ids].double()
    gated = (inputs.gates.double().unsqueeze(-1) * (inputs.query.double() @ rows.mT).relu()).sum(2)
    hint = inputs.slope.double().unsqueeze(-1) * torch.arange(case.num_blocks, 0, -1).double().log()
    logits = score_chunks(*inputs)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), gated + inputs.bias.double().unsqueeze(-1) + hint, **TOL_FP32)


def test_portions_give_the_same_logits() -> None:
    inputs = make_inputs(CASES[1])
    torch.testing.assert_close(score_chunks_naive(*inputs, chunk_elems=1), score_chunks(*inputs), **TOL_FP32)


@given(
    row=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=64),
    factor=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_rounding_keeps_three_bits_beside_the_largest_element(row: list[float], factor: float) -> None:
    rows = torch.tensor([row]) * factor
    codes, scales = quantise_codes(rows)
    error = (dequantise_codes(codes, scales) - rows).abs()
    # Half of the last of three mantissa bits; below the smallest normal number half of its smallest step.
    allowed = torch.maximum(rows.abs() / 16, scales.unsqueeze(-1) * 2.0**-10) * (1 + 1e-4)
    assert bool((error <= allowed).all())
    assert bool(dequantise_codes(codes, scales).isfinite().all())


def test_zeros_stay_zero() -> None:
    codes, scales = quantise_codes(torch.zeros(3, 8))
    assert not dequantise_codes(codes, scales).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gates": torch.ones(5, 3, 5)}, r"gates: expected shape \[5, 3, 6\], got \[5, 3, 5\]"),
        ({"codes": torch.ones(3, 40, 20)}, r"codes: expected dtype torch.float8_e4m3fn, got torch.float32"),
        ({"block_ids": torch.ones(2, dtype=torch.int32)}, r"block_ids: expected dtype torch.int64"),
        ({"bias": torch.ones(1)}, r"bias: expected shape \[3\], got \[1\]"),
        ({"slope": torch.ones(3, 1)}, r"slope: expected shape \[3\], got \[3, 1\]"),
        ({"query": torch.ones(5, 3, 20, 6).mT}, r"query: expected a last dim of stride 1"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_chunks(*make_inputs(CASES[1])._replace(**change))
