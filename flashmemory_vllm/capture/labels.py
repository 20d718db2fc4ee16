"""What dense attention looked at: mass of each block, and the blocks that were worth having."""

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


def golden_blocks(mass: torch.Tensor, largest: torch.Tensor, top_p: float, min_share: float = 0.0) -> torch.Tensor:
    """Which blocks are golden in one layer.

    A layer's golden blocks are the shortest prefix, in descending order of their mean share over the heads, that holds
    `top_p` of the whole, the block that crosses the line among them; of these, those that one head or more pays
    `min_share` of its attention to. Heads that look everywhere need many blocks to reach `top_p`, and none of these
    matters.

    Args:
        mass: float32 [..., n], mean share over the heads, adding up to 1.
        largest: float32 [..., n], largest share of any head.
        top_p: share in (0, 1].
        min_share: share in [0, 1]. Default: none is asked for.

    Returns:
        bool [..., n].
    """
    ordered, blocks = mass.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1).roll(1, dims=-1)
    before[..., 0] = 0.0
    golden = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, blocks, before < top_p)
    return golden & (largest >= min_share)


def default_min_votes(num_layers: int) -> int:
    """15 % of the layers; at least 2 where there are 6 or more, so that one odd layer decides nothing."""
    return max(2 if num_layers >= 6 else 1, round(0.15 * num_layers))
