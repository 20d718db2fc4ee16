"""Public op `score_blocks`."""

import torch

from flashmemory_kernels.common import expect_device, expect_dtype, expect_shape, runs_kernel
from flashmemory_kernels.score_blocks.naive import score_blocks_naive


def score_blocks(query: torch.Tensor, index: torch.Tensor, block_ids: torch.Tensor, scale: float) -> torch.Tensor:
    """Log-mass of blocks under one query: `log sum_r exp(scale * q . index[block, r])` per query head.

    With a block's own keys as rows this is the exact logarithm of its unnormalised attention mass, so a
    softmax over the result gives each block's share. With one row per block (a mean key) it is that row's
    logit.

    Args:
        query: [H, E].
        index: [N, Hkv, R, E], R rows that represent a block; Hkv divides H.
        block_ids: int64 [n], blocks to score; rows of other blocks are never read.
        scale: factor on the dot product.

    Returns:
        float32 [H, n].

    Raises:
        ValueError: shape, dtype or device does not match.
    """
    num_heads, width = query.shape
    expect_shape("index", index, (None, None, None, width))
    if num_heads % index.shape[1]:
        raise ValueError(f"index: expected a number of heads that divides {num_heads}, got {index.shape[1]}")
    expect_shape("block_ids", block_ids, (None,))
    expect_dtype("block_ids", block_ids, torch.int64)
    for name, tensor in (("index", index), ("block_ids", block_ids)):
        expect_device(name, tensor, query.device)
    if runs_kernel(query) and index[0, 0].is_contiguous():
        from flashmemory_kernels.score_blocks.kernel import score_blocks_triton

        return score_blocks_triton(query, index, block_ids, scale)
    return score_blocks_naive(query, index, block_ids, scale)
