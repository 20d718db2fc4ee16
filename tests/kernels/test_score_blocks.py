"""score_blocks: chunk edges, head groups, several layers, low-precision index, and rows nobody asked for."""

from typing import Any

import pytest
import torch
from flashmemory_kernels.score_blocks import score_blocks
from flashmemory_kernels.score_blocks.cases import CASES, ScoreCase, make_inputs
from flashmemory_kernels.score_blocks.naive import score_blocks_naive

# A dot product and a sum of at most 256 terms in float32.
TOL_FP32: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
SCALE = 0.3


def brute_force(query: torch.Tensor, index: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """One layer, head and block at a time, in float64."""
    num_layers, num_heads, _ = query.shape
    group = num_heads // index.shape[2]
    mass = torch.empty(num_layers, num_heads, len(ids), dtype=torch.float64)
    for layer in range(num_layers):
        for head, q in enumerate(query[layer].double()):
            for position, block in enumerate(ids.tolist()):
                logits = index[layer, block, head // group].double() @ q * SCALE
                mass[layer, head, position] = logits.exp().sum().log()
    return mass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_against_brute_force_in_float32_whatever_the_dtype(case: ScoreCase, dtype: torch.dtype) -> None:
    query, index, ids = make_inputs(case, dtype)
    got = score_blocks(query, index, ids, SCALE)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), brute_force(query, index, ids), **TOL_FP32)


@pytest.mark.parametrize("chunk_elems", [1, 2000, 1 << 20])
@pytest.mark.parametrize("case", CASES)
def test_chunking_changes_nothing(case: ScoreCase, chunk_elems: int) -> None:
    query, index, ids = make_inputs(case, torch.float32)
    chunked = score_blocks_naive(query, index, ids, SCALE, chunk_elems)
    torch.testing.assert_close(chunked, score_blocks(query, index, ids, SCALE), **TOL_FP32)


def test_wrong_arguments_are_named() -> None:
    query, index, ids = make_inputs(CASES[1])
    with pytest.raises(ValueError, match=r"index: expected shape \[3, \*, \*, \*, 19\]"):
        score_blocks(query[..., :19], index, ids, SCALE)
    with pytest.raises(ValueError, match=r"index: expected a number of heads that divides 5, got 2"):
        score_blocks(query[:, :5], index, ids, SCALE)
    with pytest.raises(ValueError, match=r"index: expected contiguous rows"):
        score_blocks(query[..., :16], index[..., :16], ids, SCALE)
    with pytest.raises(ValueError, match=r"block_ids: expected dtype torch.int64, got torch.int32"):
        score_blocks(query, index, ids.int(), SCALE)
