"""Public op `score_chunks`."""

import torch

from flashmemory_kernels.common import expect_contiguous_rows, expect_device, expect_dtype, expect_shape, runs_kernel
from flashmemory_kernels.score_chunks.naive import CODE_DTYPE, score_chunks_naive

# The first devices that convert fp8 e4m3; torch does it in software on older ones.
FP8_CAPABILITY = (8, 9)


def score_chunks(
    query: torch.Tensor,
    gates: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    block_ids: torch.Tensor,
    bias: torch.Tensor,
    slope: torch.Tensor,
) -> torch.Tensor:
    """Logits of a request's blocks in each layer for Q tokens: gated sums of rectified products, placed by distance.

    `logit = sum_h gates[h] * relu(query[h] . codes[block]) * scales[block] + bias + slope * log(distance)`, where the
    last block has the distance 1, the one before it 2.

    The products are those of the lightning indexer of DeepSeek-V3.2, over one fp8 code per block. A scale is
    positive, so it may be applied after the rectifier.

    Args:
        query: [Q, A, H, E], index heads of each token in each layer.
        gates: [Q, A, H], weight of each head; may be negative.
        codes: fp8 e4m3 [A, N, E], one code per block and layer.
        scales: float32 [A, N], positive.
        block_ids: int64 [n], blocks to score in logical order; codes of other blocks are never read.
        bias: [A], added to each logit of a layer.
        slope: [A], weight of the logarithm of the distance.

    Returns:
        float32 [Q, A, n].

    Raises:
        ValueError: shape, dtype, device or strides do not match.
    """
    expect_shape("query", query, (None, None, None, None))
    num_tokens, num_layers, num_heads, width = query.shape
    expect_shape("gates", gates, (num_tokens, num_layers, num_heads))
    expect_shape("codes", codes, (num_layers, None, width))
    expect_shape("scales", scales, (num_layers, codes.shape[1]))
    expect_shape("block_ids", block_ids, (None,))
    expect_shape("bias", bias, (num_layers,))
    expect_shape("slope", slope, (num_layers,))
    expect_dtype("codes", codes, CODE_DTYPE)
    expect_dtype("scales", scales, torch.float32)
    expect_dtype("block_ids", block_ids, torch.int64)
    others = {"gates": gates, "codes": codes, "scales": scales, "block_ids": block_ids, "bias": bias, "slope": slope}
    for name, tensor in {"query": query, **others}.items():
        expect_device(name, tensor, query.device)
        expect_contiguous_rows(name, tensor)
    arguments = query, gates, codes, scales, block_ids, bias, slope
    if runs_kernel(query) and torch.cuda.get_device_capability(query.device) >= FP8_CAPABILITY:
        from flashmemory_kernels.score_chunks.kernel import score_chunks_triton

        return score_chunks_triton(*arguments)
    return score_chunks_naive(*arguments)
