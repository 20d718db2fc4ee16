"""Public op `score_blocks`."""

import torch

from flashmemory_kernels.common import expect_contiguous_rows, expect_device, expect_dtype, expect_shape, runs_kernel
from flashmemory_kernels.score_blocks.naive import score_blocks_naive


def score_blocks(query: torch.Tensor, index: torch.Tensor, block_ids: torch.Tensor, scale: float) -> torch.Tensor:
    """Log-mass of blocks under a query per layer: `log sum_r exp(scale * q . index[layer, block, r])`.

    With a block's own keys as rows this is the exact logarithm of its unnormalised attention mass, so a
    softmax over the result gives each block's share. With one row per block (a mean key) it is that row's
    logit.

    Args:
        query: [A, Hq, E], one query per layer and head.
        index: [A, N, Hkv, R, E], R rows that represent a block in a layer; Hkv divides Hq.
        block_ids: int64 [n], blocks to score; rows of other blocks are never read.
        scale: factor on the dot product.

    Returns:
        float32 [A, Hq, n].

    Raises:
        ValueError: shape, dtype, device or strides do not match.
    """
    expect_shape("query", query, (None, None, None))
    num_layers, num_heads, width = query.shape
    expect_shape("index", index, (num_layers, None, None, None, width))
    if num_heads % index.shape[2]:
        raise ValueError(f"index: expected a number of heads that divides {num_heads}, got {index.shape[2]}")
    if not index[0, 0, 0].is_contiguous():
        raise ValueError(f"index: expected contiguous rows, got strides {index.stride()}")
    expect_shape("block_ids", block_ids, (None,))
    expect_dtype("block_ids", block_ids, torch.int64)
    for name, tensor in (("query", query), ("index", index), ("block_ids", block_ids)):
        expect_device(name, tensor, query.device)
        expect_contiguous_rows(name, tensor)
    if runs_kernel(query):
        from flashmemory_kernels.score_blocks.kernel import score_blocks_triton

        return score_blocks_triton(query, index, block_ids, scale)
    return score_blocks_naive(query, index, block_ids, scale)
