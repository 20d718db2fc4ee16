"""Public op `partial_attention`."""

import torch

from flashmemory_kernels.common import expect_device, expect_dtype, expect_shape
from flashmemory_kernels.partial_attention.cpu import partial_attention_cpu
from flashmemory_kernels.partial_attention.naive import partial_attention_naive


def partial_attention(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor | None,
    num_tokens: int,
    scale: float,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend T queries to K keys in pages; also return the log-sum-exp (FlashAttention, arXiv 2205.14135).

    Keys that lie side by side, [K, Hkv, D], are one page: `key.unsqueeze(0)` without a block table.

    Args:
        query: [T, H, D].
        key_pages: [P, block_size, Hkv, D], strided; Hkv divides H: query head h reads key head h // (H / Hkv).
        value_pages: [P, block_size, Hkv, Dv], strided; Dv <= D. They may lie within the keys.
        block_table: int32 [n], the pages that hold the keys, in order; entries past the last key are not read.
            None for pages 0, 1, 2 and so on.
        num_tokens: K; the last page may be partly filled.
        scale: factor on `q . k`.
        causal: query t sees keys 0..t; only for T == K. Default: False, every query sees every key.

    Returns:
        out [T, H, Dv] in the dtype of `query`, and lse float32 [H, T] with the natural logarithm. Without
        keys: 0 and -inf.

    Raises:
        ValueError: shape, dtype or device does not match.
    """
    num_queries, num_heads, head_dim = query.shape
    num_pages, block_size, num_kv_heads, _ = key_pages.shape
    expect_shape("key_pages", key_pages, (None, None, None, head_dim))
    expect_shape("value_pages", value_pages, (num_pages, block_size, num_kv_heads, None))
    if (value_dim := value_pages.shape[-1]) > head_dim:
        raise ValueError(f"value_pages: expected at most {head_dim} elements, as a key has, got {value_dim}")
    if num_heads % num_kv_heads:
        raise ValueError(f"key_pages: expected a number of heads that divides {num_heads}, got {num_kv_heads}")
    for name, tensor in (("key_pages", key_pages), ("value_pages", value_pages)):
        expect_dtype(name, tensor, query.dtype)
        expect_device(name, tensor, query.device)
    if block_table is not None:
        expect_shape("block_table", block_table, (None,))
        expect_dtype("block_table", block_table, torch.int32)
        expect_device("block_table", block_table, query.device)
        num_pages = len(block_table)
    if num_tokens > num_pages * block_size:
        raise ValueError(f"num_tokens: expected at most {num_pages} pages of {block_size}, got {num_tokens}")
    if causal and num_tokens != num_queries:
        raise ValueError(f"num_tokens: expected {num_queries}, one key for each causal query, got {num_tokens}")
    if num_queries == 0 or num_tokens == 0:
        empty = torch.full((num_heads, num_queries), -torch.inf, dtype=torch.float32, device=query.device)
        return query.new_zeros(num_queries, num_heads, value_dim), empty
    attend = partial_attention_cpu if query.device.type == "cpu" else partial_attention_naive
    return attend(query, key_pages, value_pages, block_table, num_tokens, scale, causal)
