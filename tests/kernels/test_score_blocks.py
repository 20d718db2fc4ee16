"""score_blocks: chunk edges, head groups, low-precision index, and index rows nobody asked for."""

from typing import Any

import pytest
import torch
from flashmemory_kernels.score_blocks import score_blocks
from flashmemory_kernels.score_blocks.cases import CASES, ScoreCase
from flashmemory_kernels.score_blocks.naive import score_blocks_naive

# A dot product and a sum of at most 128 terms in float32.
TOL_FP32: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
SCALE = 0.3


def inputs(case: ScoreCase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, index with NaN in the rows that are not asked for, ids."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(case.num_heads, case.width, generator=generator)
    ids = torch.randperm(case.num_pool_blocks, generator=generator)[: case.num_blocks]
    index = torch.full((case.num_pool_blocks, case.num_kv_heads, case.num_rows, case.width), torch.nan)
    index[ids] = torch.randn(case.num_blocks, *index.shape[1:], generator=generator)
    return query, index, ids


def brute_force(query: torch.Tensor, index: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """One head and block at a time, in float64."""
    group = len(query) // index.shape[1]
    mass = torch.empty(len(query), len(ids), dtype=torch.float64)
    for head, q in enumerate(query.double()):
        for position, block in enumerate(ids.tolist()):
            mass[head, position] = ((index[block, head // group].double() @ q) * SCALE).exp().sum().log()
    return mass


@pytest.mark.parametrize("case", CASES)
def test_against_brute_force(case: ScoreCase) -> None:
    query, index, ids = inputs(case)
    torch.testing.assert_close(
        score_blocks(query, index, ids, SCALE).double(), brute_force(query, index, ids), **TOL_FP32
    )


@pytest.mark.parametrize("chunk_elems", [1, 2000, 1 << 20])
@pytest.mark.parametrize("case", CASES)
def test_chunking_changes_nothing(case: ScoreCase, chunk_elems: int) -> None:
    query, index, ids = inputs(case)
    chunked = score_blocks_naive(query, index, ids, SCALE, chunk_elems)
    torch.testing.assert_close(chunked, score_blocks(query, index, ids, SCALE), **TOL_FP32)


def test_low_precision_index_is_scored_in_float32() -> None:
    query, index, ids = inputs(CASES[1])
    got = score_blocks(query.bfloat16(), index.bfloat16(), ids, SCALE)
    expected = brute_force(query.bfloat16(), index.bfloat16(), ids)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, **TOL_FP32)


def test_wrong_arguments_are_named() -> None:
    query, index, ids = inputs(CASES[1])
    with pytest.raises(ValueError, match=r"index: expected shape \[\*, \*, \*, 19\]"):
        score_blocks(query[:, :19], index, ids, SCALE)
    with pytest.raises(ValueError, match=r"block_ids: expected dtype torch.int64, got torch.int32"):
        score_blocks(query, index, ids.int(), SCALE)
