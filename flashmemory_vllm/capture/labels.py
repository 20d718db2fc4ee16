"""What dense attention looked at: the share of each block, of all tokens or of what goes to full blocks."""

import torch


def block_mass(queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, scale: float) -> torch.Tensor:
    """Share of each block in the attention of T tokens of each of R requests, in float32.

    Args:
        queries: [R, T, Hq, D] after RoPE.
        keys: [R, n, Hkv, block_size, D] after RoPE, blocks in logical order; Hkv divides Hq.
        positions: int64 [R, T], of each token, which attends to itself and all before it. Later keys are ignored
            whatever they hold.
        scale: factor on `q . k`.

    Returns:
        float32 [R, T, Hq, n]; each head adds up to 1.
    """
    rows, num_blocks, num_kv_heads, block_size, head_dim = keys.shape
    num_queries, num_heads = queries.shape[1:3]
    # In whole keys and in the dtype that they have: to transpose numbers one by one takes longer than the product
    by_head = keys.transpose(1, 2).reshape(rows, num_kv_heads, num_blocks * block_size, head_dim).float()
    grouped = queries.float().transpose(1, 2).reshape(rows, num_kv_heads, -1, head_dim)
    logits = (grouped @ by_head.mT).view(rows, num_heads, num_queries, -1).mul_(scale)
    later = torch.arange(logits.shape[-1], device=positions.device) > positions.unsqueeze(-1)
    # Not a sum: memory that no token was written to may hold NaN.
    shares = logits.masked_fill_(later.unsqueeze(1), -torch.inf).softmax(-1)
    return shares.view(*shares.shape[:-1], num_blocks, block_size).sum(-1).transpose(1, 2)


def full_shares(shares: torch.Tensor, num_full: torch.Tensor) -> torch.Tensor:
    """The same as shares of what a head pays to full blocks, as scores of index keys are; others have none.

    Args:
        shares: float32 [R, T, Hq, n] of `block_mass`.
        num_full: int64 [R, T], full blocks.
    """
    is_full = torch.arange(shares.shape[-1], device=shares.device) < num_full[..., None, None]
    of_full = shares.masked_fill(~is_full, 0.0)
    return of_full / of_full.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
