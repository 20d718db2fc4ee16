"""FlashAttention over a part of the keys, with its log-sum-exp, for streamed prefill on CUDA."""

import torch
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version


def flash_partial_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a contiguous run of keys.

    Args:
        query: [T, Hq, D].
        key: [K, Hkv, D].
        value: [K, Hkv, D].
        scale: factor on `q . k`.
        causal: whether query i sees only keys up to i + K - T.

    Returns:
        out [T, Hq, D] in the query's dtype and the natural-log lse, float32 [Hq, T].
    """
    num_queries, num_keys = query.shape[0], key.shape[0]
    out, lse = flash_attn_varlen_func(
        q=query.contiguous(),
        k=key.contiguous(),
        v=value.contiguous(),
        cu_seqlens_q=_bounds(num_queries, query.device),
        cu_seqlens_k=_bounds(num_keys, query.device),
        max_seqlen_q=num_queries,
        max_seqlen_k=num_keys,
        softmax_scale=scale,
        causal=causal,
        return_softmax_lse=True,
        fa_version=get_flash_attn_version(head_size=query.shape[-1]),
    )
    return out, lse


def _bounds(length: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([0, length], dtype=torch.int32, pin_memory=True).to(device, non_blocking=True)
