"""Public op `score_chunks`."""

import torch

from flashmemory_kernels.common import expect_contiguous_rows, expect_device, expect_dtype, expect_shape
from flashmemory_kernels.score_chunks.naive import CODE_DTYPE, score_chunks_naive


def score_chunks(
    query: torch.Tensor,
    gates: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    block_ids: torch.Tensor,
) -> torch.Tensor:
    """Gated sum of rectified products: `sum_h gates[h] * relu(query[h] . codes[block]) * scales[block]`.

    This is the score of the lightning indexer of DeepSeek-V3.2 over one fp8 code per block. A scale is positive,
    so it may be applied after the rectifier.

    Args:
        query: [A, H, E], index heads of one query in each layer.
        gates: [A, H], weight of each head; may be negative.
        codes: fp8 e4m3 [A, N, E], one code per block and layer.
        scales: float32 [A, N], positive.
        block_ids: int64 [n], blocks to score; codes of other blocks are never read.

    Returns:
        float32 [A, n].

    Raises:
        ValueError: shape, dtype, device or strides do not match.
    """
    expect_shape("query", query, (None, None, None))
    num_layers, num_heads, width = query.shape
    expect_shape("gates", gates, (num_layers, num_heads))
    expect_shape("codes", codes, (num_layers, None, width))
    expect_shape("scales", scales, (num_layers, codes.shape[1]))
    expect_shape("block_ids", block_ids, (None,))
    expect_dtype("codes", codes, CODE_DTYPE)
    expect_dtype("scales", scales, torch.float32)
    expect_dtype("block_ids", block_ids, torch.int64)
    for name, tensor in (("gates", gates), ("codes", codes), ("scales", scales), ("block_ids", block_ids)):
        expect_device(name, tensor, query.device)
        expect_contiguous_rows(name, tensor)
    return score_chunks_naive(query, gates, codes, scales, block_ids)
