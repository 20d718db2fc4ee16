"""Inputs of `row_lse` shared by tests and benchmarks."""

import random
from typing import NamedTuple

import torch

from flashmemory_kernels.common.due_rows import Due, make_rows


class LseCase(NamedTuple):
    """Rows of so many blocks, 0 for rows that are not scored, and padding behind them."""

    num_blocks: tuple[int, ...]
    num_padding: int
    num_heads: int
    num_queries: int
    tile: int


CASES = (
    LseCase((1,), num_padding=0, num_heads=1, num_queries=1, tile=1),
    LseCase((0, 37, 0, 5), num_padding=2, num_heads=6, num_queries=3, tile=8),
    LseCase((2100, 64), num_padding=0, num_heads=2, num_queries=5, tile=64),
    LseCase((0,), num_padding=1, num_heads=2, num_queries=2, tile=4),
)

# Three anchor layers of an 8B model: a quarter of 64 rows of 6K tokens, of 8 of 32K, and one of 500K.
BENCH_CASES = tuple(
    LseCase((num_blocks,) * num_rows, num_padding=0, num_heads=96, num_queries=4, tile=64)
    for num_rows, num_blocks in ((16, 384), (2, 2048), (1, 31250))
)


def make_inputs(case: LseCase, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-masses with NaN where they must not be read, one head that sees no block, rows, and a result of NaN."""
    rng, generator = random.Random(0), torch.Generator(device).manual_seed(0)
    given = []
    for num_blocks in case.num_blocks:
        num_queries = rng.randint(1, case.num_queries) if num_blocks else 0
        given.append({Due.NUM_BLOCKS: num_blocks, Due.NUM_QUERIES: num_queries})
    rows = make_rows(given, len(given) + case.num_padding, case.tile)
    num_tiles = sum(-(-num_blocks // case.tile) for num_blocks in case.num_blocks)
    shape = (num_tiles + 1, case.num_heads, case.num_queries, case.tile)
    mass = 5 * torch.randn(shape, generator=generator, device=device)
    mass[:, 0, :, ::2] = -torch.inf
    mass[:, -1, 0] = -torch.inf
    for row in rows.tolist():
        if row[Due.NUM_QUERIES]:
            first, behind = row[Due.FIRST_TILE], row[Due.NUM_BLOCKS] % case.tile
            last = first + -(-row[Due.NUM_BLOCKS] // case.tile) - 1
            mass[first : last + 1, :, row[Due.NUM_QUERIES] :] = torch.nan
            if behind:
                mass[last, :, :, behind:] = torch.nan
    mass[-1] = torch.nan
    lse = torch.full((len(rows), *shape[1:3]), torch.nan, device=device)
    return mass, rows.to(device), lse
