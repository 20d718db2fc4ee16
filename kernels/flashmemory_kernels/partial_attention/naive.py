"""Specification of `partial_attention`: explicit softmax in float32."""

import torch


def partial_attention_naive(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `op.partial_attention`; the logits [H, T, K] are held at once."""
    num_tokens, num_heads, head_dim = query.shape
    num_keys, num_kv_heads, _ = key.shape
    grouped = query.float().view(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    logits = torch.einsum("tkgd,skd->kgts", grouped, key.float()) * scale  # [Hkv, Hq / Hkv, T, K]
    if causal:
        future = torch.ones(num_tokens, num_keys, dtype=torch.bool, device=query.device).triu(1)
        logits = logits.masked_fill(future, -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.unsqueeze(-1)).exp()
    out = torch.einsum("kgts,skd->tkgd", weights, value.float())
    return out.reshape(query.shape).to(query.dtype), lse.reshape(num_heads, num_tokens)
