"""Triton kernel of `merge_attention`: one program per head and tile of tokens.

Tokens are the inner dim of the log-sum-exps and D that of the outputs, so both are read and written in whole
memory transactions. Each element is read by the program that writes it, before it does: the result may take
the place of part a.
"""

# A Triton kernel's arguments are pointers and scalars of the traced program: Python has no types for them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201, PLR0913, PLR0917

import torch
import triton
import triton.language as tl

from flashmemory_kernels.merge_attention.naive import or_new

# Elements of a tile: 32 for each thread of four warps.
TILE_ELEMS = 4096
NUM_WARPS = 4


# Chunks differ in length: what follows from it must not compile a kernel of its own.
@triton.jit(do_not_specialize=["stride_lah", "stride_lbh", "stride_loh", "T"])
def merge_attention_kernel(
    p_out_a, p_lse_a, p_out_b, p_lse_b, p_out, p_lse,
    stride_at, stride_ah, stride_bt, stride_bh, stride_ot, stride_oh,
    stride_lah, stride_lat, stride_lbh, stride_lbt, stride_loh, stride_lot,
    T, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge BLOCK_T rows of D elements of one head."""
    i_head = tl.program_id(0).to(tl.int64)
    i_token = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_token = i_token < T
    empty = float("-inf")
    lse_a = tl.load(p_lse_a + i_head * stride_lah + i_token * stride_lat, m_token, other=empty)
    lse_b = tl.load(p_lse_b + i_head * stride_lbh + i_token * stride_lbt, m_token, other=empty)
    lse_a = tl.where(lse_a == float("inf"), empty, lse_a)
    lse_b = tl.where(lse_b == float("inf"), empty, lse_b)
    top = tl.maximum(lse_a, lse_b)
    both_empty = top == empty
    top = tl.where(both_empty, 0.0, top)
    weight_a = tl.exp(lse_a - top)
    weight_b = tl.exp(lse_b - top)
    total = tl.where(both_empty, 1.0, weight_a + weight_b)
    lse = tl.where(both_empty, empty, top + tl.log(total))

    i_dim = tl.arange(0, BLOCK_D)
    mask = m_token[:, None] & (i_dim < D)[None, :]
    p_a = p_out_a + i_head * stride_ah + i_token[:, None] * stride_at + i_dim[None, :]
    p_b = p_out_b + i_head * stride_bh + i_token[:, None] * stride_bt + i_dim[None, :]
    out_a = tl.load(p_a, mask, other=0.0).to(tl.float32)
    out_b = tl.load(p_b, mask, other=0.0).to(tl.float32)
    # The buffer of a part of weight 0 may hold NaN, and NaN * 0 is NaN.
    weight_a = weight_a[:, None]
    weight_b = weight_b[:, None]
    out_a = tl.where(weight_a > 0, out_a * weight_a, 0.0)
    out_b = tl.where(weight_b > 0, out_b * weight_b, 0.0)
    out = (out_a + out_b) / total[:, None]
    # In place, another thread of this program may still have to read what this one overwrites.
    tl.debug_barrier()
    tl.store(p_lse + i_head * stride_loh + i_token * stride_lot, lse, m_token)
    p_result = p_out + i_head * stride_oh + i_token[:, None] * stride_ot + i_dim[None, :]
    tl.store(p_result, out.to(p_out.dtype.element_ty), mask)


def merge_attention_triton(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `op.merge_attention`; the last dim of the three outs must be contiguous."""
    out, lse = or_new(out, lse, out_a)
    num_tokens, num_heads, head_dim = out_a.shape
    block_dim = triton.next_power_of_2(head_dim)
    block_tokens = max(1, TILE_ELEMS // block_dim)
    if num_tokens:
        merge_attention_kernel[(num_heads, triton.cdiv(num_tokens, block_tokens))](
            out_a, lse_a, out_b, lse_b, out, lse,
            out_a.stride(0), out_a.stride(1), out_b.stride(0), out_b.stride(1), out.stride(0), out.stride(1),
            lse_a.stride(0), lse_a.stride(1), lse_b.stride(0), lse_b.stride(1), lse.stride(0), lse.stride(1),
            num_tokens, D=head_dim, BLOCK_T=block_tokens, BLOCK_D=block_dim, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out, lse
