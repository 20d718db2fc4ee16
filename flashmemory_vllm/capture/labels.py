"""What dense attention looked at: mass of each block, and the blocks that were worth having."""

import torch


def block_mass(query: torch.Tensor, keys: torch.Tensor, num_tokens: int, scale: float) -> torch.Tensor:
    """Share of each block in one token's attention, in float32.

    Args:
        query: [Hq, D] after RoPE.
        keys: [n, Hkv, block_size, D] after RoPE, blocks in logical order; Hkv divides Hq.
        num_tokens: tokens to attend to. Later ones, in the last block, are ignored whatever they hold.
        scale: factor on `q . k`.

    Returns:
        float32 [Hq, n]; each head adds up to 1.
    """
    num_blocks, num_kv_heads, block_size, head_dim = keys.shape
    by_head = keys.float().permute(1, 3, 0, 2).reshape(num_kv_heads, head_dim, num_blocks * block_size)
    logits = query.float().view(num_kv_heads, -1, head_dim) @ by_head * scale
    # Not a sum: memory that no token was written to may hold NaN.
    logits[..., num_tokens:] = -torch.inf
    shares = logits.flatten(0, 1).softmax(-1)
    return shares.view(-1, num_blocks, block_size).sum(-1)


def golden_votes(shares: torch.Tensor, top_p: float, min_share: float = 0.0) -> torch.Tensor:
    """Count the layers in which each block is golden.

    A layer's golden blocks are the shortest prefix, in descending order of their mean share over the heads, that holds
    `top_p` of the whole, the block that crosses the line among them; of these, those that one head or more pays
    `min_share` of its attention to. Heads that look everywhere need many blocks to reach `top_p`, and none of these
    matters.

    Args:
        shares: float32 [L, Hq, n], each head adding up to 1.
        top_p: share in (0, 1].
        min_share: share in [0, 1]. Default: none is asked for.

    Returns:
        uint8 [n].
    """
    mass = shares.mean(1)
    ordered, blocks = mass.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1).roll(1, dims=-1)
    before[:, 0] = 0.0
    golden = torch.zeros_like(mass, dtype=torch.uint8)
    golden.scatter_(-1, blocks, (before < top_p).to(torch.uint8))
    golden *= shares.amax(1) >= min_share
    return golden.sum(0, dtype=torch.uint8)


def default_min_votes(num_layers: int) -> int:
    """15 % of the layers; at least 2 where there are 6 or more, so that one odd layer decides nothing."""
    return max(2 if num_layers >= 6 else 1, round(0.15 * num_layers))
