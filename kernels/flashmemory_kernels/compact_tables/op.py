"""Public op `compact_tables`."""

import torch

from flashmemory_kernels.common import expect_contiguous_rows, expect_device, expect_dtype, expect_shape, runs_kernel
from flashmemory_kernels.compact_tables.naive import HEADER_FIELDS, compact_tables_naive


def compact_tables(
    packed: torch.Tensor, seq_lens: torch.Tensor, block_tables: torch.Tensor, compacted_lens: torch.Tensor
) -> None:
    """Write a step's compacted tables and lengths from one uploaded buffer.

    `packed` begins with a header [G, R, 3] of (offset, count, evicted tokens); the slots of a row are
    `packed[offset : offset + count]`. Mutates `block_tables[g, r, :count]`, and `compacted_lens[g, r] =
    seq_lens[r] - evicted` for every r < R. A count of 0 leaves the row's table as it was in the step before.
    What the header says is trusted: checking it would stall the device.

    Args:
        packed: int32 [P], header and ragged slots.
        seq_lens: int32 [R], logical lengths, padding rows included.
        block_tables: int32 [G, Rmax, W], R <= Rmax; no count exceeds W.
        compacted_lens: int32 [G, Rmax].

    Raises:
        ValueError: shape, dtype, device or strides do not match, or `packed` is shorter than its header.
    """
    expect_shape("packed", packed, (None,))
    expect_shape("seq_lens", seq_lens, (None,))
    expect_shape("block_tables", block_tables, (None, None, None))
    num_groups, max_rows, _ = block_tables.shape
    expect_shape("compacted_lens", compacted_lens, (num_groups, max_rows))
    num_rows, header_elems = len(seq_lens), num_groups * len(seq_lens) * HEADER_FIELDS
    if num_rows > max_rows:
        raise ValueError(f"seq_lens: expected at most {max_rows} rows, got {num_rows}")
    if len(packed) < header_elems:
        raise ValueError(f"packed: expected a header of {header_elems} elements, got {len(packed)} elements")
    for name, tensor in (
        ("packed", packed),
        ("seq_lens", seq_lens),
        ("block_tables", block_tables),
        ("compacted_lens", compacted_lens),
    ):
        expect_dtype(name, tensor, torch.int32)
        expect_device(name, tensor, packed.device)
        expect_contiguous_rows(name, tensor)
    if runs_kernel(packed):
        from flashmemory_kernels.compact_tables.kernel import compact_tables_triton

        compact_tables_triton(packed, seq_lens, block_tables, compacted_lens)
    else:
        compact_tables_naive(packed, seq_lens, block_tables, compacted_lens)
