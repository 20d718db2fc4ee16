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
    num_layers, num_heads, width = query.shape
    _, _, num_kv_heads, num_rows, _ = index.shape
    grouped = (query.float() * scale).reshape(num_layers, num_kv_heads, num_heads // num_kv_heads, width)
    mass = torch.empty(num_layers, num_heads, len(block_ids), dtype=torch.float32, device=query.device)
    chunk = max(1, chunk_elems // (num_layers * num_kv_heads * num_rows * width))
    for start in range(0, len(block_ids), chunk):
        rows = index.index_select(1, block_ids[start : start + chunk]).float()  # [A, m, Hkv, R, E]
        logits = torch.einsum("akge,amkre->akgmr", grouped, rows)
        mass[:, :, start : start + chunk] = logits.logsumexp(-1).flatten(1, 2)
    return mass
