"""Public op `score_chunks`."""

from typing import get_args

import torch

from flashmemory_kernels.common import (
    Aggregate,
    expect_contiguous_rows,
    expect_device,
    expect_dtype,
    expect_shape,
    runs_kernel,
)
from flashmemory_kernels.common.due_rows import Due
from flashmemory_kernels.score_chunks.naive import CODE_DTYPE, Ensemble, score_chunks_naive


def score_chunks(
    heads: torch.Tensor,
    gates: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    block_ids: torch.Tensor,
    rows: torch.Tensor,
    ensemble: Ensemble,
    logits: torch.Tensor,
) -> None:
    """Logits of the blocks of scored rows by the codes of their C chunks; mutates `logits[:, place, :num_blocks]`.

    A chunk's logit in a layer is `sum_h gates[h] * relu(heads[h] . code) * scale + bias + slope * log(distance)`, where
    the last chunk of the last block has the distance 1, the one before it 2. A block has the largest logit of its own
    chunks and, with an offset each, of the last R chunks of the block before it; that of a layer group is combined from
    its layers, and the largest of all queries' counts. A chunk whose logit is no number counts `LEAST_LOGIT`, so that a
    broken query asks for nothing and a broken code only speaks for nobody.

    The products are those of the lightning indexer of DeepSeek-V3.2, over one fp8 code per chunk. A scale is positive,
    so it may be applied after the rectifier. What rows say is trusted: checking it would stall the device.

    Args:
        heads: [n, Q, A, H, E], index heads of each row's newest queries by age, in each layer; Q may be less than the
            number of queries that a row says, and then the newest count.
        gates: [n, Q, A, H], weight of each head; may be negative.
        codes: fp8 e4m3 [A, N, C, E], one code for each chunk of a logical block and layer, those of a block contiguous.
        scales: float32 [A, N, C], positive; those of a block contiguous.
        block_ids: int32 [P, W], logical blocks of each place by position; codes of other blocks are never read.
        rows: int32 [n, len(Due)]; see `common.due_rows`.
        ensemble: what makes one logit of a block of its chunks'.
        logits: float32 [G, P, W], rows contiguous.

    Raises:
        ValueError: shape, dtype, device or strides do not match, or layers are combined in another way.
    """
    arguments = heads, gates, codes, scales, block_ids, rows, ensemble, logits
    _expect(*arguments)
    if runs_kernel(heads):
        from flashmemory_kernels.score_chunks.kernel import score_chunks_triton

        score_chunks_triton(*arguments)
    else:
        score_chunks_naive(*arguments)


def _expect(
    heads: torch.Tensor,
    gates: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    block_ids: torch.Tensor,
    rows: torch.Tensor,
    ensemble: Ensemble,
    logits: torch.Tensor,
) -> None:
    expect_shape("heads", heads, (None, None, None, None, None))
    num_rows, num_queries, num_layers, num_heads, width = heads.shape
    expect_shape("gates", gates, (num_rows, num_queries, num_layers, num_heads))
    expect_shape("codes", codes, (num_layers, None, None, width))
    expect_shape("scales", scales, tuple(codes.shape[:3]))
    expect_shape("rows", rows, (num_rows, len(Due)))
    expect_shape("block_ids", block_ids, (None, None))
    expect_shape("logits", logits, (None, *block_ids.shape))
    _expect_ensemble(ensemble, num_layers, codes.shape[2])
    if not (codes[0, 0].is_contiguous() and scales[0, 0].is_contiguous()):
        raise ValueError(
            f"codes: expected those of a block contiguous, got strides {codes.stride()} and {scales.stride()}"
        )
    tensors = (
        ("codes", codes, CODE_DTYPE), ("scales", scales, torch.float32), ("rows", rows, torch.int32),
        ("block_ids", block_ids, torch.int32), ("logits", logits, torch.float32),
        *((name, getattr(ensemble, name), torch.float32) for name in ("bias", "slope", "reach_offset")),
        ("groups", ensemble.groups, torch.int32),
    )  # fmt: skip
    for name, tensor, dtype in tensors:
        expect_dtype(name, tensor, dtype)
        if name in {"rows", "bias", "slope", "reach_offset", "groups"} and not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    for name, tensor in (("heads", heads), ("gates", gates), *((name, tensor) for name, tensor, _ in tensors)):
        expect_device(name, tensor, heads.device)
        expect_contiguous_rows(name, tensor)


def _expect_ensemble(ensemble: Ensemble, num_layers: int, chunks_per_block: int) -> None:
    expect_shape("bias", ensemble.bias, (num_layers,))
    expect_shape("slope", ensemble.slope, (num_layers,))
    expect_shape("reach_offset", ensemble.reach_offset, (num_layers, None))
    expect_shape("groups", ensemble.groups, (num_layers,))
    if ensemble.reach_offset.shape[1] > chunks_per_block:
        raise ValueError(
            f"reach_offset: expected at most {chunks_per_block} columns, as many as a block has chunks, "
            f"got {ensemble.reach_offset.shape[1]}"
        )
    if ensemble.aggregate not in get_args(Aggregate):
        raise ValueError(f"aggregate: expected 'max' or 'mean', got {ensemble.aggregate!r}")
