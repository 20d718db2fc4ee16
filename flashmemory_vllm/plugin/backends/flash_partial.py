"""FlashAttention over a part of the keys, with its log-sum-exp, for streamed prefill on CUDA."""

from functools import cache, lru_cache

import torch
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version


def flash_partial_attention(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor | None,
    num_tokens: int,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over keys in pages, which are read where they lie.

    Pages in order whose tokens are evenly spaced (heads inside tokens, as in a staging buffer) are handed over
    as one run of keys, the fastest form; others by their block table, as vLLM hands over its cache.

    Args:
        query: [T, Hq, D], strided.
        key_pages: [P, block_size, Hkv, D], strided.
        value_pages: [P, block_size, Hkv, D], strided.
        block_table: int32 [n], pages of the keys. None for pages 0, 1, 2 and so on.
        num_tokens: K >= 1, keys; the last page may be partly filled.
        scale: factor on `q . k`.
        causal: whether query i sees only keys up to i; only for K == T.

    Returns:
        out [T, Hq, D] in the query's dtype and the natural-log lse, float32 [Hq, T].
    """
    keys_upto = _bounds(num_tokens, query.device)
    if block_table is None:
        # Not a token more: what follows may be NaN, which a weight of 0 does not cancel.
        key, value = (pages.flatten(0, 1)[:num_tokens] for pages in (key_pages, value_pages))
        where = {"cu_seqlens_k": keys_upto}
    else:
        key, value = key_pages, value_pages
        where = {"block_table": block_table.unsqueeze(0), "seqused_k": keys_upto[1:]}
    num_queries = query.shape[0]
    out, lse = flash_attn_varlen_func(
        q=query,
        # With one head the strides that torch leaves may be none that the kernel's bulk loads accept.
        k=canonicalize_singleton_dim_strides(key),
        v=canonicalize_singleton_dim_strides(value),
        cu_seqlens_q=_bounds(num_queries, query.device),
        max_seqlen_q=num_queries,
        max_seqlen_k=num_tokens,
        softmax_scale=scale,
        causal=causal,
        return_softmax_lse=True,
        fa_version=_version(query.shape[-1]),
        **where,
    )
    return out, lse


@lru_cache(maxsize=256)
def _bounds(length: int, device: torch.device) -> torch.Tensor:
    """Where a batch of one sequence begins and ends, int32 [2]; the same few lengths come in every layer."""
    return torch.arange(0, length + 1, length, dtype=torch.int32, device=device)


@cache
def _version(head_dim: int) -> int | None:
    return get_flash_attn_version(head_size=head_dim)
