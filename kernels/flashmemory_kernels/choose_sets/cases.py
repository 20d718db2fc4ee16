"""Inputs of `choose_sets` shared by tests and benchmarks."""

import random
from typing import NamedTuple

import torch

from flashmemory_kernels.choose_sets.naive import LIST_HEADER, ChoicePolicy
from flashmemory_kernels.common.due_rows import Due, make_rows

# What a test finds where nothing may be written.
POISON = -77


class ChoiceCase(NamedTuple):
    """R rows, every fourth in the long list, and padding, of P places with up to W blocks in G groups.

    With `levels` memories have so many values, so that many blocks are worth the same.
    """

    num_rows: int
    num_padding: int
    num_places: int
    num_groups: int
    width: int
    num_listed: int
    policy: ChoicePolicy
    weights: tuple[float, ...] = (0.5, 0.25)
    levels: int = 0
    seed: int = 0


# Weights and bonus are powers of two, so that a fused multiplication and addition rounds as two do.
CASES = (
    ChoiceCase(1, num_padding=0, num_places=1, num_groups=1, width=1, num_listed=1, policy=ChoicePolicy()),
    ChoiceCase(6, num_padding=2, num_places=9, num_groups=1, width=45, num_listed=50,
               policy=ChoicePolicy("sum", 0.5, 1.0)),
    ChoiceCase(7, num_padding=1, num_places=7, num_groups=2, width=64, num_listed=3,
               policy=ChoicePolicy("max", 0.5, 1.0, threshold=0.25), levels=4, seed=1),
    ChoiceCase(8, num_padding=0, num_places=8, num_groups=3, width=30, num_listed=9, policy=ChoicePolicy(),
               weights=(1.0,), levels=1, seed=2),
    ChoiceCase(3, num_padding=1, num_places=4, num_groups=1, width=60, num_listed=9,
               policy=ChoicePolicy("sum", 0.5, 1.0, threshold=0.125), levels=6, seed=3),
)  # fmt: skip

# Of several tiles, where they are short
WIDE_CASE = CASES[-1]

# A quarter of 64 rows of 6K tokens, of 8 of 32K, and one of 500K.
BENCH_CASES = tuple(
    ChoiceCase(num_rows, num_padding=0, num_places=256, num_groups=1, width=width, num_listed=64,
               policy=ChoicePolicy("sum", 0.5, 1.0))
    for num_rows, width in ((16, 384), (2, 2048), (1, 31250))
)  # fmt: skip


class ChoiceInputs(NamedTuple):
    """Arguments of the op."""

    memory: torch.Tensor
    in_set: torch.Tensor
    rows: torch.Tensor
    weights: torch.Tensor
    policy: ChoicePolicy
    short_list: torch.Tensor
    long_list: torch.Tensor


def make_inputs(case: ChoiceCase, device: str = "cpu") -> ChoiceInputs:
    """Random memories with some NaN, which count 0, and all NaN where nothing is known; sets, budgets and caps."""
    rng, generator = random.Random(case.seed), torch.Generator().manual_seed(case.seed)
    places = rng.sample(range(case.num_places), case.num_rows)
    shape = (len(case.weights), case.num_groups, case.num_places, case.width)
    memory = torch.rand(shape, generator=generator) ** 4
    if case.levels:
        memory = (memory * case.levels).round() / case.levels
    memory[torch.rand(shape, generator=generator) < 0.05] = torch.nan
    given, long_start = [], 0
    for row, place in enumerate(places):
        end = rng.randint(1 + case.width // 4, case.width)
        recent = rng.randint(1, min(3, end))
        sink_end, first_recent = rng.randint(0, min(2, end - recent)), end - recent
        num_blocks = max(0, end - rng.randint(0, 2 + recent))
        span = first_recent - sink_end
        want, cap = rng.randint(0, span // 2 + 1), rng.choice([0, 1, 3, span, span])
        is_long = row % 4 == 3
        given.append({
            Due.PLACE: place, Due.EPOCH: 100 + row, Due.STEP: 7, Due.IS_NEW: int(row % 3 == 2),
            Due.NUM_BLOCKS: num_blocks, Due.SINK_END: sink_end, Due.FIRST_RECENT: first_recent, Due.END: end,
            Due.WANT: want, Due.CAP: cap, Due.LONG_START: long_start if is_long else -1,
        })  # fmt: skip
        long_start += case.num_groups * span if is_long else 0
        memory[:, :, place, num_blocks:] = torch.nan
    in_set = (torch.rand(shape[1:], generator=generator) < 0.3).to(torch.int8)
    lists = torch.full((case.num_rows + case.num_padding, case.num_groups, LIST_HEADER + 2 * case.num_listed), POISON)
    return ChoiceInputs(
        memory.to(device),
        in_set.to(device),
        make_rows(given, len(lists), tile=1).to(device),
        torch.tensor(case.weights, device=device),
        case.policy,
        lists.int().to(device),
        torch.full((long_start + 3,), POISON, dtype=torch.int32, device=device),
    )
