"""Fast CPU path of `partial_attention`: torch's blocked kernel, whose temporaries do not grow with K."""

import torch

from flashmemory_kernels.partial_attention.naive import gather_tokens


def partial_attention_cpu(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor | None,
    num_tokens: int,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `op.partial_attention`."""
    key, value = (gather_tokens(pages, block_table, num_tokens) for pages in (key_pages, value_pages))
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    group_size = num_heads // num_kv_heads
    # The kernel wants as many key heads as query heads. Query heads that share a key head go to the batch dim
    # instead, where one key serves all of them with stride 0: nothing is repeated in memory.
    grouped = query.reshape(num_queries, num_kv_heads, group_size, head_dim).permute(2, 1, 0, 3)
    shared_shape = (group_size, num_kv_heads, num_tokens, head_dim)
    # It also wants values as wide as keys
    value_dim = value.shape[-1]
    value = torch.nn.functional.pad(value, (0, head_dim - value_dim))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        grouped,
        _rows(key).transpose(0, 1).expand(shared_shape),
        _rows(value).transpose(0, 1).expand(shared_shape),
        0.0,
        causal,
        scale=scale,
    )
    # out [g, Hkv, T, D] and lse [g, Hkv, T]; query head h = kv_head * g + member.
    out = out.permute(2, 1, 0, 3).reshape(query.shape)[..., :value_dim]
    return out, lse.transpose(0, 1).reshape(num_heads, num_queries).float()


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The kernel reads rows of D without a stride; a transposed page format must be copied first."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
