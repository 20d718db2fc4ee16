"""Inputs of `score_blocks` shared by tests and benchmarks."""

from typing import NamedTuple

import torch


class ScoreCase(NamedTuple):
    """n of N blocks in A layers, each with R rows of E per KV head, under Hq query heads."""

    num_layers: int
    num_pool_blocks: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    num_rows: int
    width: int


CASES = (
    ScoreCase(1, num_pool_blocks=2, num_blocks=1, num_heads=1, num_kv_heads=1, num_rows=1, width=8),
    ScoreCase(3, num_pool_blocks=40, num_blocks=23, num_heads=6, num_kv_heads=2, num_rows=16, width=20),
    ScoreCase(2, num_pool_blocks=9, num_blocks=7, num_heads=4, num_kv_heads=2, num_rows=5, width=128),
    ScoreCase(1, num_pool_blocks=50, num_blocks=41, num_heads=20, num_kv_heads=1, num_rows=1, width=256),
    ScoreCase(2, num_pool_blocks=150, num_blocks=140, num_heads=8, num_kv_heads=8, num_rows=1, width=128),
    ScoreCase(1, num_pool_blocks=30, num_blocks=30, num_heads=4, num_kv_heads=2, num_rows=16, width=128),
)

# One anchor layer of an 8B model over 32K, 128K and 500K tokens in blocks of 16, and four of them: bounds,
# mean and exact.
BENCH_CASES = tuple(
    ScoreCase(num_layers, num_blocks + 64, num_blocks, num_heads=32, num_kv_heads=8, num_rows=num_rows, width=width)
    for num_rows, width in ((1, 256), (1, 128), (16, 128))
    for num_layers, num_blocks in ((1, 2048), (1, 8192), (1, 31250), (4, 8192))
)


def make_inputs(
    case: ScoreCase, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, index with NaN in the rows that are not asked for, ids."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.num_layers, case.num_pool_blocks, case.num_kv_heads, case.num_rows, case.width)
    query = torch.randn(case.num_layers, case.num_heads, case.width, generator=generator, device=device).to(dtype)
    ids = torch.randperm(case.num_pool_blocks, generator=generator, device=device)
    index = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    index[:, ids[case.num_blocks :]] = torch.nan
    return query, index, ids[: case.num_blocks]
