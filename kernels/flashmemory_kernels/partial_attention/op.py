"""Public op `partial_attention`."""

import torch

from flashmemory_kernels.common import expect_device, expect_dtype, expect_shape
from flashmemory_kernels.partial_attention.cpu import partial_attention_cpu
from flashmemory_kernels.partial_attention.naive import partial_attention_naive


def partial_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend T queries to K keys; also return the log-sum-exp (FlashAttention, arXiv 2205.14135).

    Args:
        query: [T, H, D].
        key: [K, Hkv, D], Hkv divides H: query head h reads key head h // (H / Hkv).
        value: [K, Hkv, D].
        scale: factor on `q . k`.
        causal: query t sees keys 0..t; only for T == K. Default: False, every query sees every key.

    Returns:
        out [T, H, D] in the dtype of `query`, and lse float32 [H, T] with the natural logarithm. Without
        keys: 0 and -inf.

    Raises:
        ValueError: shape, dtype or device does not match.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_keys, num_kv_heads, _ = key.shape
    expect_shape("key", key, (num_tokens if causal else None, None, head_dim))
    expect_shape("value", value, (num_keys, num_kv_heads, head_dim))
    if num_heads % num_kv_heads:
        raise ValueError(f"key: expected a number of heads that divides {num_heads}, got {num_kv_heads}")
    for name, tensor in (("key", key), ("value", value)):
        expect_dtype(name, tensor, query.dtype)
        expect_device(name, tensor, query.device)
    if num_tokens == 0 or num_keys == 0:
        empty = torch.full((num_heads, num_tokens), -torch.inf, dtype=torch.float32, device=query.device)
        return torch.zeros_like(query), empty
    if query.device.type == "cpu":
        return partial_attention_cpu(query, key, value, scale, causal)
    return partial_attention_naive(query, key, value, scale, causal)
