"""Inputs of `score_chunks` shared by tests and benchmarks."""

from typing import NamedTuple

import torch

from flashmemory_kernels.score_chunks.naive import quantise_codes


class ChunkCase(NamedTuple):
    """n of N blocks in A layers, each with one code of E under H index heads of Q tokens."""

    num_layers: int
    num_pool_blocks: int
    num_blocks: int
    num_heads: int
    width: int
    num_tokens: int = 1


class ChunkInputs(NamedTuple):
    """Arguments of the op."""

    query: torch.Tensor
    gates: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    block_ids: torch.Tensor
    bias: torch.Tensor
    slope: torch.Tensor


CASES = (
    ChunkCase(1, num_pool_blocks=2, num_blocks=1, num_heads=1, width=8),
    ChunkCase(3, num_pool_blocks=40, num_blocks=23, num_heads=6, width=20, num_tokens=5),
    ChunkCase(2, num_pool_blocks=150, num_blocks=140, num_heads=16, width=128),
    ChunkCase(2, num_pool_blocks=9, num_blocks=0, num_heads=4, width=64),
)

# Three anchor layers of an 8B model over 32K, 128K and 500K tokens in chunks of 4, for one token and for a question.
BENCH_CASES = tuple(
    ChunkCase(3, num_chunks + 64, num_chunks, num_heads=32, width=128, num_tokens=num_tokens)
    for num_tokens in (1, 16)
    for num_chunks in (8192, 32768, 125000)
)


def make_inputs(case: ChunkCase, dtype: torch.dtype = torch.float32, device: str = "cpu") -> ChunkInputs:
    """Arguments of the op; codes and scales of blocks that are not asked for are NaN.

    Heads differ in size by up to 10^6, gates by as much the other way: every head has a say in the logits.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    factor = torch.logspace(-3, 3, case.num_heads, device=device)
    query = draw(case.num_tokens, case.num_layers, case.num_heads, case.width) * factor.unsqueeze(-1)
    gates = draw(case.num_tokens, case.num_layers, case.num_heads) / factor
    codes, scales = quantise_codes(draw(case.num_layers, case.num_pool_blocks, case.width))
    ids = torch.randperm(case.num_pool_blocks, generator=generator, device=device)
    others = ids[case.num_blocks :]
    # The one NaN of e4m3, without its sign.
    codes.view(torch.uint8)[:, others] = 0x7F
    scales[:, others] = torch.nan
    bias, slope = draw(case.num_layers), draw(case.num_layers)
    return ChunkInputs(query.to(dtype), gates.to(dtype), codes, scales, ids[: case.num_blocks], bias, slope)
