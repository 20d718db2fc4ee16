"""Inputs of `forecast_blocks` shared by tests and benchmarks."""

import random
from typing import NamedTuple

import torch

from flashmemory_kernels.common.due_rows import Due, make_rows
from flashmemory_kernels.forecast_blocks.naive import NOT_ASKED, NUM_OTHERS, Head, num_features


class ForecastCase(NamedTuple):
    """Rows of so many blocks, 0 for rows that are not scored, and padding behind them; P places, more than rows."""

    num_channels: int
    num_units: int
    num_groups: int
    num_blocks: tuple[int, ...]
    num_padding: int
    num_places: int
    width: int


CASES = (
    ForecastCase(1, num_units=1, num_groups=1, num_blocks=(1,), num_padding=0, num_places=1, width=1),
    ForecastCase(3, num_units=8, num_groups=2, num_blocks=(0, 70, 9), num_padding=2, num_places=6, width=72),
    ForecastCase(6, num_units=32, num_groups=1, num_blocks=(130, 64), num_padding=0, num_places=3, width=130),
    ForecastCase(0, num_units=4, num_groups=1, num_blocks=(5,), num_padding=1, num_places=2, width=8),
)

# A quarter of 64 rows of 6K tokens, of 8 of 32K, and one of 500K.
BENCH_CASES = tuple(
    ForecastCase(6, num_units=32, num_groups=1, num_blocks=(num_blocks,) * num_rows, num_padding=0, num_places=256,
                 width=num_blocks)
    for num_rows, num_blocks in ((16, 384), (2, 2048), (1, 31250))
)  # fmt: skip


class ForecastInputs(NamedTuple):
    """Arguments of the op."""

    memory: torch.Tensor
    rows: torch.Tensor
    head: Head
    block_size: int


def make_inputs(case: ForecastCase, device: str = "cpu") -> ForecastInputs:
    """Arguments of the op; what must not be read of a memory is NaN. The last row's newest block has a NaN as logit."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    places = rng.sample(range(case.num_places), len(case.num_blocks))
    memory = torch.full((case.num_channels + NUM_OTHERS, case.num_groups, case.num_places, case.width), torch.nan)
    given = []
    for line, (place, num_blocks) in enumerate(zip(places, case.num_blocks, strict=True)):
        num_known = 0 if line % 2 else num_blocks // 2
        fields = {Due.PLACE: place, Due.NUM_BLOCKS: num_blocks, Due.NUM_KNOWN: num_known}
        given.append({**fields, Due.NUM_QUERIES: int(num_blocks > 0)})
        of_place = memory[:-1, :, place, :num_blocks]
        of_place.copy_(torch.randn(of_place.shape, generator=generator) * 2)
        of_place[: case.num_channels] = of_place[: case.num_channels].sigmoid() ** 4
        of_place[-1, :, ::3] = NOT_ASKED
        of_place[-2, :, num_blocks - 1 :] = torch.nan
    units, features = case.num_units, num_features(case.num_channels)
    hidden, hidden_bias, out, linear, bias = (
        torch.randn(shape, generator=generator).to(device) / 2
        for shape in ((features, units), (units,), (units,), (features,), (1,))
    )
    calibration, mix = torch.tensor([0.7, -0.5], device=device), torch.rand(case.num_channels, generator=generator)
    head = Head(hidden, hidden_bias, out, linear, bias, calibration, mix.to(device))
    return ForecastInputs(
        memory.to(device), make_rows(given, len(given) + case.num_padding, 1).to(device), head, block_size=16
    )
