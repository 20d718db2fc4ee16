"""Public op `merge_attention`."""

import torch

from flashmemory_kernels.common import expect_device, expect_dtype, expect_shape, runs_kernel
from flashmemory_kernels.merge_attention.naive import merge_attention_naive, or_new


def merge_attention(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention over two disjoint sets of keys into attention over their union.

    The dtypes of the three outs may differ; the sum is formed in float32. To fold many parts, keep the result
    in a float32 `out` that takes the place of `out_a` from the second merge on, and give the last merge an
    `out` of the dtype wanted: each merge then reads and writes every element once.

    Args:
        out_a: [T, H, D], softmax-weighted values of part a.
        lse_a: float32 [H, T], natural-log sum of exponentials of part a's logits; infinite (either sign)
            where part a has no keys, whose `out_a` is then ignored.
        out_b: [T, H, D], part b.
        lse_b: float32 [H, T], part b.
        out: [T, H, D], where the result goes; may be `out_a`. Default: a new tensor like `out_a`.
        lse: float32 [H, T], likewise; may be `lse_a`. Default: a new tensor.

    Returns:
        out and lse; 0 and -inf where both parts are empty.

    Raises:
        ValueError: shape, dtype or device does not match.
    """
    num_tokens, num_heads, head_dim = out_a.shape
    out, lse = or_new(out, lse, out_a)
    for name, tensor in (("out_b", out_b), ("out", out)):
        expect_shape(name, tensor, (num_tokens, num_heads, head_dim))
        expect_device(name, tensor, out_a.device)
    for name, tensor in (("lse_a", lse_a), ("lse_b", lse_b), ("lse", lse)):
        expect_shape(name, tensor, (num_heads, num_tokens))
        expect_dtype(name, tensor, torch.float32)
        expect_device(name, tensor, out_a.device)
    if runs_kernel(out_a) and all(tensor.stride(-1) == 1 for tensor in (out_a, out_b, out)):
        from flashmemory_kernels.merge_attention.kernel import merge_attention_triton

        return merge_attention_triton(out_a, lse_a, out_b, lse_b, out, lse)
    return merge_attention_naive(out_a, lse_a, out_b, lse_b, out, lse)
