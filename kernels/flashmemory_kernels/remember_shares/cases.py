"""Inputs of `remember_shares` shared by tests and benchmarks."""

import random
from typing import NamedTuple

import torch

from flashmemory_kernels.common.due_rows import Due, make_rows, padded_mass
from flashmemory_kernels.remember_shares.channels import Channel, Channels


class RememberCase(NamedTuple):
    """Rows of so many blocks, 0 for rows that are not scored, and padding behind them; P places, more than rows."""

    layer_groups: tuple[int, ...]
    num_heads: int
    num_queries: int
    num_blocks: tuple[int, ...]
    num_padding: int
    num_places: int
    width: int
    tile: int
    channels: tuple[Channel, ...]


CASES = (
    RememberCase((0,), num_heads=1, num_queries=1, num_blocks=(1,), num_padding=0, num_places=1, width=1, tile=1,
                 channels=(Channel(0.9),)),
    RememberCase((1, 0, 1), num_heads=6, num_queries=4, num_blocks=(0, 9, 0, 16, 3), num_padding=3, num_places=7,
                 width=18, tile=8, channels=(Channel(0.9), Channel(0.98), Channel(1.0, "mean", "sum"))),
    RememberCase((0, 0), num_heads=3, num_queries=5, num_blocks=(70, 64, 0), num_padding=1, num_places=4, width=70,
                 tile=32, channels=(Channel(0.0), Channel(0.95, "rms", "rms"), Channel(0.5, "rms"), Channel(1.0),
                                    Channel(0.7, "mean", "rms"))),
    RememberCase((0,), num_heads=2, num_queries=2, num_blocks=(0,), num_padding=1, num_places=2, width=4, tile=2,
                 channels=(Channel(0.9),)),
)  # fmt: skip

# Three anchor layers of an 8B model: a quarter of 64 rows of 6K tokens, of 8 of 32K, and one of 500K.
BENCH_CASES = tuple(
    RememberCase((0, 0, 0), num_heads=32, num_queries=4, num_blocks=(num_blocks,) * num_rows, num_padding=0,
                 num_places=256, width=num_blocks, tile=64, channels=(Channel(0.9), Channel(0.98)))
    for num_rows, num_blocks in ((16, 384), (2, 2048), (1, 31250))
)  # fmt: skip


class RememberInputs(NamedTuple):
    """Arguments of the op."""

    mass: torch.Tensor
    lse: torch.Tensor
    rows: torch.Tensor
    groups: torch.Tensor
    channels: Channels
    memory: torch.Tensor


def make_inputs(case: RememberCase, device: str = "cpu") -> RememberInputs:
    """Arguments of the op; what must not be read of masses, memory and of other places is NaN.

    In the first scored row one head sees no block, another one gets NaN from one block and infinity from another.
    """
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    places = rng.sample(range(case.num_places), len(case.num_blocks))
    given = []
    for place, num_blocks in zip(places, case.num_blocks, strict=True):
        num_queries = rng.randint(1, case.num_queries) if num_blocks else 0
        fields = {Due.PLACE: place, Due.NUM_BLOCKS: num_blocks, Due.NUM_QUERIES: num_queries}
        given.append({**fields, Due.NUM_KNOWN: rng.randint(0, num_blocks), Due.ELAPSED: rng.randint(0, 9)})
    rows = make_rows(given, len(given) + case.num_padding, case.tile)
    is_scored = rows[:, Due.NUM_QUERIES] > 0
    num_tiles = sum(-(-num_blocks // case.tile) for num_blocks in case.num_blocks)
    num_heads = len(case.layer_groups) * case.num_heads
    shape = (num_tiles + 1, num_heads, case.num_queries, case.tile)
    mass = 4 * torch.randn(shape, generator=generator)
    mass[-1] = torch.nan
    mass[0, 0], mass[0, -1, :, -1] = -torch.inf, torch.inf
    lse = torch.full((len(rows), num_heads, case.num_queries), torch.nan)
    lse[is_scored] = _lse(padded_mass(mass, rows[is_scored]))
    mass[0, -1, :, 0] = torch.nan
    groups = torch.tensor(case.layer_groups, dtype=torch.int32)
    memory_shape = (len(case.channels), max(case.layer_groups) + 1, case.num_places, case.width)
    memory = torch.rand(memory_shape, generator=generator)
    for place, fields in zip(places, given, strict=True):
        memory[:, :, place, fields[Due.NUM_KNOWN] :] = torch.nan
    channels = Channels.of(case.channels, device)
    return RememberInputs(
        mass.to(device), lse.to(device), rows.to(device), groups.to(device), channels, memory.to(device)
    )


def _lse(log_mass: torch.Tensor) -> torch.Tensor:
    lse = log_mass.logsumexp(3) if log_mass.shape[3] else log_mass.sum(3) - torch.inf
    return torch.where(lse == -torch.inf, torch.inf, lse)
