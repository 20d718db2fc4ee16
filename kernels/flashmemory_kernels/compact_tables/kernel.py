"""Triton kernel of `compact_tables`: one launch whatever the number of rows and layer groups.

The grid covers the widest table, as the host does not wait for the counts; a program beyond its row's count
ends after reading the header.
"""

# A Triton kernel's arguments are pointers and scalars of the traced program: Python has no types for them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201, PLR0913, PLR0917

import torch
import triton
import triton.language as tl

# A row of 500K tokens, 31K entries of which 13.5 % are resident, is one or two tiles.
TILE = 4096
NUM_WARPS = 8


# The number of rows differs from step to step: a value such as 1 must not compile a kernel of its own.
@triton.jit(do_not_specialize=["num_rows"])
def compact_tables_kernel(
    p_packed, p_seq_lens, p_tables, p_lens,
    stride_group, stride_row, stride_lens, num_rows,
    TILE: tl.constexpr,
):  # fmt: skip
    """Copy one tile of one row of one layer group; the first tile also writes the row's length."""
    i_row, i_group, i_tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    p_header = p_packed + (i_group * num_rows + i_row) * 3
    offset = tl.load(p_header)
    count = tl.load(p_header + 1)
    if i_tile == 0:
        evicted = tl.load(p_header + 2)
        tl.store(p_lens + i_group * stride_lens + i_row, tl.load(p_seq_lens + i_row) - evicted)
    if i_tile * TILE < count:
        i_entry = i_tile * TILE + tl.arange(0, TILE)
        m_entry = i_entry < count
        slots = tl.load(p_packed + offset + i_entry, m_entry)
        p_row = p_tables + i_group * stride_group + i_row * stride_row
        tl.store(p_row + i_entry, slots, m_entry)


def compact_tables_triton(
    packed: torch.Tensor, seq_lens: torch.Tensor, block_tables: torch.Tensor, compacted_lens: torch.Tensor
) -> None:
    """See `op.compact_tables`."""
    num_rows, (num_groups, _, width) = len(seq_lens), block_tables.shape
    if num_rows == 0:
        return
    compact_tables_kernel[(num_rows, num_groups, triton.cdiv(width, TILE))](
        packed, seq_lens, block_tables, compacted_lens,
        block_tables.stride(0), block_tables.stride(1), compacted_lens.stride(0), num_rows,
        TILE=TILE, num_warps=NUM_WARPS,
    )  # fmt: skip
