"""Specification and CPU path of `compact_tables`."""

import torch

# Header fields of one row of one layer group.
HEADER_FIELDS = 3


def compact_tables_naive(
    packed: torch.Tensor, seq_lens: torch.Tensor, block_tables: torch.Tensor, compacted_lens: torch.Tensor
) -> None:
    """See `op.compact_tables`."""
    num_groups, num_rows = len(block_tables), len(seq_lens)
    header = packed[: num_groups * num_rows * HEADER_FIELDS].view(num_groups, num_rows, HEADER_FIELDS)
    torch.sub(seq_lens, header[:, :, 2], out=compacted_lens[:, :num_rows])
    for group, rows in enumerate(header.tolist()):
        for row, (offset, count, _) in enumerate(rows):
            block_tables[group, row, :count] = packed[offset : offset + count]
