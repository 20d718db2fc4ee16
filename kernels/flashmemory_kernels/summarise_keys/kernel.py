"""Triton kernel of `summarise_keys`: each key is read once, from wherever its page lies."""

# A Triton kernel's arguments are pointers and scalars of the traced program: Python has no types for them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# NaN is what does not equal itself.
# ruff: noqa: ANN001, ANN201, PLR0124, PLR0913, PLR0917

import torch
import triton
import triton.language as tl

from flashmemory_kernels.score_chunks import naive

# Keys that a warp holds at once: 16 bytes a thread and load in bf16, four loads in flight.
ELEMS_PER_WARP = 1024
LARGEST_CODE, SMALLEST_SCALE = tl.constexpr(float(naive.LARGEST_CODE)), tl.constexpr(naive.SMALLEST_SCALE)
MAX_WARPS = 8


@triton.jit
def encode_fp8(values):
    """Bytes of the fp8 e4m3 codes nearest to float32 values of up to 448, ties to even, as every GPU can do it."""
    sign = (values.to(tl.int32, bitcast=True) >> 24) & 0x80
    sizes = tl.abs(values)
    bits = sizes.to(tl.int32, bitcast=True)
    # Three bits behind the point, or where codes are subnormal a multiple of 2^-9.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    rounded = tl.where(sizes < 0.015625, (sizes + 24576.0) - 24576.0, normal)
    # The same fields, in a format whose exponent is 8 larger.
    half = (rounded * 0.00390625).to(tl.float16).to(tl.int16, bitcast=True)
    return (sign | ((half.to(tl.int32) >> 7) & 0x7F)).to(tl.uint8)


@triton.jit
def summarise_keys_kernel(
    p_keys, p_slots, p_index, p_ids, p_scales,
    stride_slot, stride_head, stride_token, stride_dim,
    stride_block, stride_index_head, num_heads,
    KIND: tl.constexpr, HAS_SLOTS: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
    T_PAD: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Summarise one block of one KV head."""
    # Heads first: programs that run together read and write neighbouring memory.
    i_head = tl.program_id(0).to(tl.int64) % num_heads
    i_position = tl.program_id(0).to(tl.int64) // num_heads
    slot = i_position
    if HAS_SLOTS:
        slot = tl.load(p_slots + i_position)
    i_block = tl.load(p_ids + i_position)
    i_token = tl.arange(0, T_PAD)
    i_dim = tl.arange(0, D_PAD)
    m_token = i_token < T
    m_dim = i_dim < D
    m_key = m_token[:, None] & m_dim[None, :]
    p_tile = p_keys + slot * stride_slot + i_head * stride_head
    keys = tl.load(p_tile + i_token[:, None] * stride_token + i_dim[None, :] * stride_dim, m_key, other=0.0)
    p_rows = p_index + i_block * stride_block + i_head * stride_index_head
    if KIND == "exact_fp8":
        keys = keys.to(tl.float32)
        peak = tl.max(tl.max(tl.abs(keys), axis=1), axis=0)
        is_broken = tl.max(tl.max((keys != keys).to(tl.int32), axis=1), axis=0) > 0
        scale = tl.where(is_broken, float("nan"), tl.maximum(tl.div_rn(peak, LARGEST_CODE), SMALLEST_SCALE))
        values = tl.div_rn(keys, scale)
        codes = encode_fp8(tl.minimum(tl.maximum(values, -LARGEST_CODE), LARGEST_CODE))
        tl.store(p_rows + i_token[:, None] * D + i_dim[None, :], codes, m_key)
        tl.store(p_scales + i_block * num_heads + i_head, scale)
    elif KIND == "exact":
        tl.store(p_rows + i_token[:, None] * D + i_dim[None, :], keys, m_key)
    elif KIND == "mean":
        tl.store(p_rows + i_dim, tl.sum(keys.to(tl.float32), axis=0) / T, m_dim)
    else:
        keys = keys.to(tl.float32)
        tl.store(p_rows + i_dim, tl.min(tl.where(m_token[:, None], keys, float("inf")), axis=0), m_dim)
        tl.store(p_rows + D + i_dim, tl.max(tl.where(m_token[:, None], keys, float("-inf")), axis=0), m_dim)


def summarise_keys_triton(
    keys: torch.Tensor,
    slots: torch.Tensor | None,
    index: torch.Tensor,
    block_ids: torch.Tensor,
    kind: str,
    scales: torch.Tensor | None = None,
) -> None:
    """See `op.summarise_keys`; the rows of one block and KV head must be contiguous."""
    _, num_heads, num_tokens, head_dim = keys.shape
    if len(block_ids) == 0:
        return
    if scales is not None:
        index = index.view(torch.uint8)
    tokens_padded, dim_padded = triton.next_power_of_2(num_tokens), triton.next_power_of_2(head_dim)
    summarise_keys_kernel[(num_heads * len(block_ids),)](
        keys, block_ids if slots is None else slots, index, block_ids, index if scales is None else scales,
        *keys.stride(), index.stride(0), index.stride(1), num_heads,
        KIND=kind, HAS_SLOTS=slots is not None, T=num_tokens, D=head_dim,
        T_PAD=tokens_padded, D_PAD=dim_padded,
        num_warps=min(MAX_WARPS, max(1, tokens_padded * dim_padded // ELEMS_PER_WARP)),
    )  # fmt: skip
