"""Public op `translate_slots`."""

import torch

from flashmemory_kernels.common import expect_contiguous_rows, expect_device, expect_dtype, expect_shape, runs_kernel
from flashmemory_kernels.translate_slots.naive import translate_slots_naive


def translate_slots(slot_mapping: torch.Tensor, lut: torch.Tensor, block_size: int, out: torch.Tensor) -> None:
    """Turn logical slot indices into the device's, `block * block_size + offset` in both worlds.

    Mutates `out[:, :T]`, one row for each layer group, and overwrites `slot_mapping` with the row of group 0.
    Negative indices are padding and stay. Block ids are trusted: checking them would stall the device.

    Args:
        slot_mapping: int64 [T], contiguous.
        lut: int32 [G, N], slot of each logical block in each layer group.
        block_size: tokens in a block.
        out: int64 [G, W], W >= T; columns from T on stay as they are.

    Raises:
        ValueError: shape, dtype, device or strides do not match.
    """
    expect_shape("slot_mapping", slot_mapping, (None,))
    expect_shape("lut", lut, (None, None))
    expect_shape("out", out, (len(lut), None))
    if out.shape[1] < len(slot_mapping):
        raise ValueError(f"out: expected at least {len(slot_mapping)} columns, got {out.shape[1]}")
    for name, tensor, dtype in (
        ("slot_mapping", slot_mapping, torch.int64), ("lut", lut, torch.int32), ("out", out, torch.int64)
    ):  # fmt: skip
        expect_dtype(name, tensor, dtype)
        expect_device(name, tensor, slot_mapping.device)
        expect_contiguous_rows(name, tensor)
    if runs_kernel(slot_mapping):
        from flashmemory_kernels.translate_slots.kernel import translate_slots_triton

        translate_slots_triton(slot_mapping, lut, block_size, out)
    else:
        translate_slots_naive(slot_mapping, lut, block_size, out)
