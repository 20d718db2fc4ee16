"""Shapes of `score_blocks` shared by tests and benchmarks."""

from typing import NamedTuple


class ScoreCase(NamedTuple):
    """n of N blocks, each with R rows of E per KV head, under H query heads."""

    num_pool_blocks: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    num_rows: int
    width: int


CASES = (
    ScoreCase(num_pool_blocks=2, num_blocks=1, num_heads=1, num_kv_heads=1, num_rows=1, width=8),
    ScoreCase(num_pool_blocks=40, num_blocks=23, num_heads=6, num_kv_heads=2, num_rows=16, width=20),
    ScoreCase(num_pool_blocks=9, num_blocks=7, num_heads=4, num_kv_heads=2, num_rows=5, width=128),
    ScoreCase(num_pool_blocks=50, num_blocks=41, num_heads=4, num_kv_heads=1, num_rows=1, width=256),
    ScoreCase(num_pool_blocks=64, num_blocks=64, num_heads=8, num_kv_heads=8, num_rows=1, width=128),
)
