"""Inputs of `ensemble_scores` shared by tests and benchmarks."""

from typing import NamedTuple

import torch


class EnsembleCase(NamedTuple):
    """n blocks under Hq heads of the layers whose groups are named."""

    layer_groups: tuple[int, ...]
    num_heads: int
    num_blocks: int


CASES = (
    EnsembleCase(layer_groups=(0,), num_heads=1, num_blocks=1),
    EnsembleCase(layer_groups=(1, 0, 1), num_heads=6, num_blocks=100),
    EnsembleCase(layer_groups=(0, 0, 0, 0), num_heads=32, num_blocks=9000),
)

# Four anchor layers of an 8B model over 32K, 128K and 500K tokens in blocks of 16.
BENCH_CASES = tuple(
    EnsembleCase(layer_groups, num_heads=32, num_blocks=num_blocks)
    for num_blocks in (2048, 8192, 31250)
    for layer_groups in ((0, 0, 0, 0), (0, 1, 2, 3))
)


def make_inputs(case: EnsembleCase, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, int]:
    """Log-masses with some blocks excluded for one head and, if there are more blocks, all for another."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (len(case.layer_groups), case.num_heads, case.num_blocks)
    mass = torch.randn(shape, generator=generator, device=device) * 5
    if case.num_blocks > 1:
        mass[0, 0, ::2] = -torch.inf
        mass[-1, -1] = -torch.inf
    layer_groups = torch.tensor(case.layer_groups, dtype=torch.int32, device=device)
    return mass, layer_groups, max(case.layer_groups) + 1
