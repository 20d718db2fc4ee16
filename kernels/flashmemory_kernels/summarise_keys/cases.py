"""Inputs of `summarise_keys` shared by tests and benchmarks."""

from typing import NamedTuple

import torch

from flashmemory_kernels.summarise_keys.op import Kind, row_shape

KINDS: tuple[Kind, ...] = ("bounds", "mean", "exact")


class SummaryCase(NamedTuple):
    """n blocks out of S pages of T tokens with Hkv heads of D."""

    num_slots: int
    num_blocks: int
    num_kv_heads: int
    block_size: int
    head_dim: int


CASES = (
    SummaryCase(num_slots=1, num_blocks=1, num_kv_heads=1, block_size=1, head_dim=1),
    SummaryCase(num_slots=5, num_blocks=3, num_kv_heads=2, block_size=20, head_dim=20),
    SummaryCase(num_slots=13, num_blocks=11, num_kv_heads=8, block_size=32, head_dim=128),
)

# The blocks of a decode step of 16 rows at most, and of prefill chunks of 8K and 32K tokens.
BENCH_CASES = tuple(
    SummaryCase(num_slots=8192, num_blocks=num_blocks, num_kv_heads=8, block_size=16, head_dim=128)
    for num_blocks in (1, 512, 2048)
)


def make_inputs(
    case: SummaryCase, kind: Kind, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments of the op but the kind: keys in pages with values beside them and tokens outside of heads.

    Pages that are not asked for and the index are NaN.
    """
    generator = torch.Generator(device).manual_seed(0)
    slots = torch.randperm(case.num_slots, generator=generator, device=device)[: case.num_blocks]
    block_ids = torch.randperm(case.num_slots, generator=generator, device=device)[: case.num_blocks]
    shape = (case.num_slots, case.block_size, case.num_kv_heads, 2 * case.head_dim)
    pages = torch.full(shape, torch.nan, dtype=dtype, device=device)
    written = (case.num_blocks, *shape[1:3], case.head_dim)
    pages[slots, ..., : case.head_dim] = torch.randn(written, generator=generator, device=device).to(dtype)
    keys = pages.transpose(1, 2)[..., : case.head_dim]
    rows = row_shape(kind, case.block_size, case.head_dim)
    index = torch.full((case.num_slots, case.num_kv_heads, *rows), torch.nan, dtype=dtype, device=device)
    return keys, slots, index, block_ids


def make_fp8_inputs(
    case: SummaryCase, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `make_inputs` for "exact_fp8", and the scales; block i's keys are of size 2^(3 i), the first one's are 0."""
    keys, slots, index, block_ids = make_inputs(case, "exact", dtype, device)
    for number, slot in enumerate(slots.tolist()):
        keys[slot] *= 2.0 ** (3 * number) if number else 0.0
    codes = torch.full_like(index, torch.nan).to(torch.float8_e4m3fn)
    return keys, slots, codes, block_ids, torch.full(index.shape[:2], torch.nan, device=device)
