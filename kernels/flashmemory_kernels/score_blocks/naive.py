"""Specification and CPU path of `score_blocks`."""

import torch

# Elements of the gathered index that are held in float32 at once: 64 MiB.
CHUNK_ELEMS = 1 << 24


def score_blocks_naive(
    query: torch.Tensor,
    index: torch.Tensor,
    block_ids: torch.Tensor,
    scale: float,
    chunk_elems: int = CHUNK_ELEMS,
) -> torch.Tensor:
    """See `op.score_blocks`; walks over the blocks in chunks so that temporaries stay bounded."""
    num_heads, width = query.shape
    _, num_kv_heads, num_rows, _ = index.shape
    grouped = query.float().view(num_kv_heads, num_heads // num_kv_heads, width) * scale
    mass = torch.empty(num_heads, len(block_ids), dtype=torch.float32, device=query.device)
    chunk = max(1, chunk_elems // (num_kv_heads * num_rows * width))
    for start in range(0, len(block_ids), chunk):
        rows = index.index_select(0, block_ids[start : start + chunk]).float()  # [m, Hkv, R, E]
        logits = torch.einsum("kge,mkre->kgmr", grouped, rows)
        mass[:, start : start + chunk] = logits.logsumexp(-1).flatten(0, 1)
    return mass
