"""Triton kernel of `translate_slots`.

One program translates its tokens for every layer group: group 0 overwrites the input, so no other program may
still have to read it.
"""

# A Triton kernel's arguments are pointers and scalars of the traced program: Python has no types for them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201, PLR0913, PLR0917

import torch
import triton
import triton.language as tl

TILE = 256
NUM_WARPS = 2


# The number of tokens differs from step to step: a value such as 1 must not compile a kernel of its own.
@triton.jit(do_not_specialize=["num_tokens"])
def translate_slots_kernel(
    p_slot_mapping, p_lut, p_out,
    stride_lut, stride_out, num_tokens, num_groups, block_size,
    TILE: tl.constexpr,
):  # fmt: skip
    """Translate TILE tokens for all layer groups."""
    i_token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    m_token = i_token < num_tokens
    logical = tl.load(p_slot_mapping + i_token, m_token, other=-1)
    m_real = logical >= 0
    block = logical // block_size
    offset = logical - block * block_size
    for group in range(num_groups):
        i_group = tl.cast(group, tl.int64)
        slot = tl.load(p_lut + i_group * stride_lut + block, m_real, other=0).to(tl.int64)
        translated = tl.where(m_real, slot * block_size + offset, logical)
        tl.store(p_out + i_group * stride_out + i_token, translated, m_token)
        if group == 0:
            tl.store(p_slot_mapping + i_token, translated, m_token)


def translate_slots_triton(slot_mapping: torch.Tensor, lut: torch.Tensor, block_size: int, out: torch.Tensor) -> None:
    """See `op.translate_slots`."""
    num_tokens = len(slot_mapping)
    if num_tokens == 0:
        return
    translate_slots_kernel[(triton.cdiv(num_tokens, TILE),)](
        slot_mapping, lut, out,
        lut.stride(0), out.stride(0), num_tokens, len(lut), block_size,
        TILE=TILE, num_warps=NUM_WARPS,
    )  # fmt: skip
