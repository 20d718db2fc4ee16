"""Specification and CPU path of `score_rows`."""

from typing import NamedTuple

import torch

from flashmemory_kernels.common.due_rows import Due, scored_rows

CODE_DTYPE = torch.float8_e4m3fn
# Elements of the gathered index that are held in float32 at once: 64 MiB.
CHUNK_ELEMS = 1 << 24


class OnlySets(NamedTuple):
    """That only blocks in the set gain mass, and those that a row's memory does not know, which are newer.

    Attributes:
        in_set: int8 [G, P, W], rows contiguous, 1 for blocks in the set.
        groups: int32 [A], layer group of each layer.
    """

    in_set: torch.Tensor
    groups: torch.Tensor


def score_rows_naive(
    queries: torch.Tensor,
    index: torch.Tensor,
    scales: torch.Tensor | None,
    block_ids: torch.Tensor,
    rows: torch.Tensor,
    scale: float,
    mass: torch.Tensor,
    only: OnlySets | None = None,
) -> None:
    """See `op.score_rows`; walks over the blocks in chunks so that temporaries stay bounded."""
    _, num_heads, _, tile = mass.shape
    chunk = max(1, CHUNK_ELEMS // index[:, 0].numel())
    for row in rows[scored_rows(rows)].tolist():
        place, num_blocks, num_queries = row[Due.PLACE], row[Due.NUM_BLOCKS], row[Due.NUM_QUERIES]
        age = torch.arange(num_queries, device=queries.device)
        newest = queries[:, place, (row[Due.POSITION] - age) % queries.shape[2]].float() * scale
        num_tiles = -(-num_blocks // tile)
        of_row = torch.full((num_heads, num_queries, num_tiles * tile), -torch.inf, device=mass.device)
        ids = block_ids[place, :num_blocks].long()
        for start in range(0, num_blocks, chunk):
            of_chunk = _log_mass(newest, index, scales, ids[start : start + chunk])
            of_row[:, :, start : start + of_chunk.shape[2]] = of_chunk
        if only is not None:
            may_gain = only.in_set[:, place, :num_blocks] != 0
            may_gain[:, row[Due.NUM_KNOWN] :] = True
            by_head = may_gain[only.groups].repeat_interleave(num_heads // len(only.groups), 0)
            of_row[:, :, :num_blocks].masked_fill_(~by_head.unsqueeze(1), -torch.inf)
        first = row[Due.FIRST_TILE]
        tiled = of_row.view(num_heads, num_queries, num_tiles, tile).permute(2, 0, 1, 3)
        mass[first : first + num_tiles, :, :num_queries] = tiled


def _log_mass(
    queries: torch.Tensor, index: torch.Tensor, scales: torch.Tensor | None, ids: torch.Tensor
) -> torch.Tensor:
    """Log-mass [A * Hq, q, m] of blocks under queries [A, q, Hq, D]."""
    num_layers, num_queries, _, head_dim = queries.shape
    num_kv_heads, width = index.shape[2], index.shape[4]
    if width == 2 * head_dim:
        queries = torch.cat((queries.clamp(max=0), queries.clamp(min=0)), dim=-1)
    queries = queries.view(num_layers, num_queries, num_kv_heads, -1, width)
    if index.dtype == CODE_DTYPE:
        # Gathered as bytes: indexing does not know fp8 on every device.
        rows = index.view(torch.uint8).index_select(1, ids).view(CODE_DTYPE).float()
    else:
        rows = index.index_select(1, ids).float()
    logits = torch.einsum("aqkge,amkre->akgqmr", queries, rows)
    if scales is not None:
        logits = logits * scales.index_select(1, ids).mT[:, :, None, None, :, None]
    log_mass = logits.logsumexp(-1).flatten(0, 2)
    return log_mass.masked_fill(~log_mass.isfinite(), -torch.inf)
