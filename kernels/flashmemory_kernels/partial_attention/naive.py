"""Specification of `partial_attention`: gather the pages, then explicit softmax in float32."""

import torch


def gather_tokens(pages: torch.Tensor, block_table: torch.Tensor | None, num_tokens: int) -> torch.Tensor:
    """The first `num_tokens` tokens [K, Hkv, D] of pages [P, block_size, Hkv, D] in the order of the table."""
    num_pages = -(-num_tokens // pages.shape[1])
    chosen = pages[:num_pages] if block_table is None else pages[block_table[:num_pages]]
    return chosen.flatten(0, 1)[:num_tokens]


def partial_attention_naive(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor | None,
    num_tokens: int,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `op.partial_attention`; the logits [H, T, K] are held at once."""
    key, value = (gather_tokens(pages, block_table, num_tokens) for pages in (key_pages, value_pages))
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    grouped = query.float().view(num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    logits = torch.einsum("tkgd,skd->kgts", grouped, key.float()) * scale  # [Hkv, Hq / Hkv, T, K]
    if causal:
        future = torch.ones(num_queries, num_tokens, dtype=torch.bool, device=query.device).triu(1)
        logits = logits.masked_fill(future, -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.unsqueeze(-1)).exp()
    out = torch.einsum("kgts,skd->tkgd", weights, value.float())
    return out.reshape(num_queries, num_heads, -1).to(query.dtype), lse.reshape(num_heads, num_queries)
