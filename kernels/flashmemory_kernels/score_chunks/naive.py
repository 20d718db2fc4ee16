"""Specification and CPU path of `score_chunks`, and the number format of the codes."""

from typing import NamedTuple

import torch

from flashmemory_kernels.common import Aggregate, aggregated
from flashmemory_kernels.common.due_rows import Due, scored_rows

CODE_DTYPE = torch.float8_e4m3fn
LARGEST_CODE = torch.finfo(CODE_DTYPE).max
# A row of zeros keeps a scale that can be divided by.
SMALLEST_SCALE = 1e-12
# What is no number counts as a logit that nobody asks for
LEAST_LOGIT = -1e4
# Elements of the gathered codes that are held in float32 at once: 64 MiB.
CHUNK_ELEMS = 1 << 24


class Ensemble(NamedTuple):
    """What makes one logit of a block of the products of its chunks in A layers.

    Attributes:
        bias: float32 [A], added to each logit of a layer.
        slope: float32 [A], weight of the logarithm of the distance.
        reach_offset: float32 [A, R], added where one of the last R chunks of a block speaks for the next block, the
            offset of the nearest one last; R is at most the chunks of a block.
        groups: int32 [A], layer group of each layer, trusted: each of the G groups has a layer.
        aggregate: how the layers of a group are combined.
    """

    bias: torch.Tensor
    slope: torch.Tensor
    reach_offset: torch.Tensor
    groups: torch.Tensor
    aggregate: Aggregate


def quantise_codes(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows to fp8 with a scale each, so that the largest element of a row keeps its place.

    Args:
        rows: [..., E].

    Returns:
        Codes, fp8 e4m3 [..., E], and scales, float32 [...]; a row is its code times its scale.
    """
    rows = rows.float()
    scales = (rows.abs().amax(-1) / LARGEST_CODE).clamp(min=SMALLEST_SCALE)
    # The quotient may be above the largest code by a rounding error, and would then become NaN.
    codes = (rows / scales.unsqueeze(-1)).clamp(-LARGEST_CODE, LARGEST_CODE).to(CODE_DTYPE)
    return codes, scales


def dequantise_codes(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 rows [..., E] that codes and scales stand for."""
    return codes.float() * scales.unsqueeze(-1)


def block_logits(chunk_logits: torch.Tensor, chunks_per_block: int, reach_offset: torch.Tensor) -> torch.Tensor:
    """The largest logit of each block's C chunks and, with their offsets, of the R chunks before them.

    Args:
        chunk_logits: [..., A, n * C].
        chunks_per_block: C.
        reach_offset: [A, R], the offset of the nearest chunk last.

    Returns:
        [..., A, n].
    """
    num_blocks = chunk_logits.shape[-1] // chunks_per_block
    by_block = chunk_logits.view(*chunk_logits.shape[:-1], num_blocks, chunks_per_block)
    logits, reach = by_block.amax(-1), reach_offset.shape[1]
    if reach and logits.shape[-1] > 1:
        before = (by_block[..., :-1, chunks_per_block - reach :] + reach_offset.unsqueeze(1)).amax(-1)
        logits = torch.cat((logits[..., :1], torch.maximum(logits[..., 1:], before)), dim=-1)
    return logits


def score_chunks_naive(  # noqa: PLR0913, PLR0917 - as the op, and how much is held at once
    heads: torch.Tensor,
    gates: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    block_ids: torch.Tensor,
    rows: torch.Tensor,
    ensemble: Ensemble,
    logits: torch.Tensor,
    chunk_elems: int = CHUNK_ELEMS,
) -> None:
    """See `op.score_chunks`; walks over the chunks in portions so that temporaries stay bounded."""
    per_block = codes.shape[2]
    of_block = torch.arange(per_block, device=heads.device)
    for index in scored_rows(rows).tolist():
        row = rows[index].tolist()
        place, num_blocks, num_queries = row[Due.PLACE], row[Due.NUM_BLOCKS], row[Due.NUM_QUERIES]
        ids = (block_ids[place, :num_blocks, None].long() * per_block + of_block).flatten()
        query, gate = heads[index, :num_queries].float(), gates[index, :num_queries].float()
        products = _products(query, gate, codes.flatten(1, 2), scales.flatten(1, 2), ids, chunk_elems)
        distance = torch.arange(len(ids), 0, -1, dtype=torch.float32, device=heads.device)
        placed = products + ensemble.bias.unsqueeze(-1) + ensemble.slope.unsqueeze(-1) * distance.log()
        of_chunks = torch.where(placed.isfinite(), placed, LEAST_LOGIT)
        by_layer = block_logits(of_chunks, per_block, ensemble.reach_offset)  # [q, A, n]
        for group, target in enumerate(logits):
            members = by_layer[:, ensemble.groups == group]
            target[place, :num_blocks] = aggregated(members, ensemble.aggregate, 1).amax(0)


def _products(
    query: torch.Tensor,
    gates: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    ids: torch.Tensor,
    chunk_elems: int,
) -> torch.Tensor:
    """Gated sums of rectified products [q, A, m] of chunks int64 [m] for queries [q, A, H, E]."""
    num_queries, num_layers, num_heads, width = query.shape
    products = torch.empty(num_queries, num_layers, len(ids), dtype=torch.float32, device=query.device)
    # Rows are gathered as bytes: indexing does not know fp8 on every device.
    as_bytes = codes.view(torch.uint8)
    portion = max(1, chunk_elems // (num_layers * max(width, num_queries * num_heads)))
    for start in range(0, len(ids), portion):
        own = ids[start : start + portion]
        gathered = as_bytes.index_select(1, own).view(CODE_DTYPE).float()  # [A, m, E]
        rectified = torch.einsum("qahe,ame->qahm", query, gathered).relu()
        summed = torch.einsum("qah,qahm->qam", gates, rectified)
        products[..., start : start + portion] = summed * scales.index_select(1, own)
    return products
