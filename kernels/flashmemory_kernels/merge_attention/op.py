"""Public op `merge_attention`."""

import torch

from flashmemory_kernels.common import expect_device, expect_dtype, expect_shape, runs_kernel
from flashmemory_kernels.merge_attention.naive import merge_attention_naive


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention over two disjoint sets of keys into attention over their union.

    Args:
        out_a: [T, H, D], softmax-weighted values of part a.
        lse_a: float32 [H, T], natural-log sum of exponentials of part a's logits; infinite (either sign)
            where part a has no keys, whose `out_a` is then ignored.
        out_b: [T, H, D], part b; its dtype may differ.
        lse_b: float32 [H, T], part b.

    Returns:
        out [T, H, D] in the dtype of `out_a` and lse float32 [H, T]; 0 and -inf where both parts are empty.

    Raises:
        ValueError: shape, dtype or device does not match.
    """
    num_tokens, num_heads, head_dim = out_a.shape
    expect_shape("out_b", out_b, (num_tokens, num_heads, head_dim))
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        expect_shape(name, lse, (num_heads, num_tokens))
        expect_dtype(name, lse, torch.float32)
    for name, tensor in (("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        expect_device(name, tensor, out_a.device)
    if runs_kernel(out_a) and out_a.stride(-1) == 1 and out_b.stride(-1) == 1:
        from flashmemory_kernels.merge_attention.kernel import merge_attention_triton

        return merge_attention_triton(out_a, lse_a, out_b, lse_b)
    return merge_attention_naive(out_a, lse_a, out_b, lse_b)
