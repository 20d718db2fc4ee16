"""Inputs of `translate_slots` shared by tests and benchmarks."""

from typing import NamedTuple

import torch


class TranslateCase(NamedTuple):
    """T tokens, of blocks out of N, for G layer groups; `out` holds W >= T columns."""

    num_tokens: int
    num_groups: int
    num_blocks: int
    block_size: int
    width: int


CASES = (
    TranslateCase(num_tokens=1, num_groups=1, num_blocks=1, block_size=1, width=1),
    TranslateCase(num_tokens=7, num_groups=3, num_blocks=5, block_size=16, width=9),
    TranslateCase(num_tokens=256, num_groups=1, num_blocks=40, block_size=20, width=256),
    TranslateCase(num_tokens=1000, num_groups=4, num_blocks=300, block_size=32, width=1024),
)

# Decode of one row, of a full batch, and chunks of prefill; block ids of a host pool of 500K tokens.
BENCH_CASES = tuple(
    TranslateCase(num_tokens, num_groups=num_groups, num_blocks=31250, block_size=16, width=num_tokens)
    for num_tokens, num_groups in ((1, 1), (256, 4), (8192, 4), (65536, 1))
)

# What a test finds where nothing may be written.
POISON = -77


def make_inputs(case: TranslateCase, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logical slots with every third one padding, random tables, a poisoned output."""
    generator = torch.Generator().manual_seed(0)
    logical = torch.randint(case.num_blocks * case.block_size, (case.num_tokens,), generator=generator)
    logical[2::3] = -1
    # Slots so large that their product with the block size needs 64 bits.
    lut = torch.randint(2**31 - 1, (case.num_groups, case.num_blocks), generator=generator, dtype=torch.int32)
    out = torch.full((case.num_groups, case.width), POISON)
    return logical.to(device), lut.to(device), out.to(device)
