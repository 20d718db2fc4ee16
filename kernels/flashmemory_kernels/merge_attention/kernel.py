"""Triton kernel of `merge_attention`: one program per token and head."""

# A Triton kernel's arguments are pointers and scalars of the traced program: Python has no types for them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201, PLR0913, PLR0917

import torch
import triton
import triton.language as tl


@triton.jit
def merge_attention_kernel(
    p_out_a, p_lse_a, p_out_b, p_lse_b, p_out, p_lse,
    stride_at, stride_ah, stride_bt, stride_bh, stride_ot, stride_oh,
    stride_lah, stride_lat, stride_lbh, stride_lbt, stride_loh, stride_lot,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge one row of D elements."""
    i_token = tl.program_id(0).to(tl.int64)
    i_head = tl.program_id(1).to(tl.int64)
    lse_a = tl.load(p_lse_a + i_head * stride_lah + i_token * stride_lat)
    lse_b = tl.load(p_lse_b + i_head * stride_lbh + i_token * stride_lbt)
    empty = float("-inf")
    lse_a = tl.where(lse_a == float("inf"), empty, lse_a)
    lse_b = tl.where(lse_b == float("inf"), empty, lse_b)
    top = tl.maximum(lse_a, lse_b)
    both_empty = top == empty
    top = tl.where(both_empty, 0.0, top)
    weight_a = tl.exp(lse_a - top)
    weight_b = tl.exp(lse_b - top)
    total = tl.where(both_empty, 1.0, weight_a + weight_b)
    tl.store(p_lse + i_head * stride_loh + i_token * stride_lot, tl.where(both_empty, empty, top + tl.log(total)))

    i_dim = tl.arange(0, BLOCK_D)
    m_dim = i_dim < D
    out_a = tl.load(p_out_a + i_token * stride_at + i_head * stride_ah + i_dim, m_dim, other=0.0).to(tl.float32)
    out_b = tl.load(p_out_b + i_token * stride_bt + i_head * stride_bh + i_dim, m_dim, other=0.0).to(tl.float32)
    # The buffer of a part of weight 0 may hold NaN, and NaN * 0 is NaN.
    out_a = tl.where(weight_a > 0, out_a * weight_a, 0.0)
    out_b = tl.where(weight_b > 0, out_b * weight_b, 0.0)
    out = (out_a + out_b) / total
    tl.store(p_out + i_token * stride_ot + i_head * stride_oh + i_dim, out.to(p_out.dtype.element_ty), m_dim)


def merge_attention_triton(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `op.merge_attention`; the last dim of both outs must be contiguous."""
    num_tokens, num_heads, head_dim = out_a.shape
    out = torch.empty_like(out_a, memory_format=torch.contiguous_format)
    lse = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=out_a.device)
    if num_tokens:
        merge_attention_kernel[(num_tokens, num_heads)](
            out_a, lse_a, out_b, lse_b, out, lse,
            out_a.stride(0), out_a.stride(1), out_b.stride(0), out_b.stride(1), out.stride(0), out.stride(1),
            lse_a.stride(0), lse_a.stride(1), lse_b.stride(0), lse_b.stride(1), lse.stride(0), lse.stride(1),
            D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim),
        )  # fmt: skip
    return out, lse
