"""Compacted block tables and lengths: what attention reads instead of vLLM's logical ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flashmemory_vllm.residency.types import Row


@dataclass(frozen=True, slots=True, eq=False)
class CompactedTable:
    """One layer group's view of the batch.

    Attributes:
        block_table: int32 [R, W] device slots in logical order; columns past a row's length are not read.
        seq_lens: int32 [R] tokens in those slots; 0 in padding rows.
        seq_lens_host: int32 [R] upper bound of `seq_lens` on the host.
        max_seq_len: upper bound over the rows.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_host: torch.Tensor
    max_seq_len: int


class StepTables:
    """Persistent device tensors, one block table and one length vector for each layer group.

    Only full blocks are ever left out of a table, so a row's compacted length is its logical length minus a
    multiple of the block size that the host knows exactly, even while the host only bounds the logical one.

    Args:
        num_groups: G.
        max_rows: most rows of a batch, padding included.
        width: most blocks of a request.
        device: where attention runs.
    """

    def __init__(self, num_groups: int, max_rows: int, width: int, device: torch.device) -> None:
        self._block_tables = torch.zeros((num_groups, max_rows, width), dtype=torch.int32, device=device)
        self._seq_lens = torch.zeros((num_groups, max_rows), dtype=torch.int32, device=device)
        self._device = device

    def fill(self, rows: Sequence[Row], num_rows: int, seq_lens: torch.Tensor) -> list[CompactedTable]:
        """Write the batch's rows.

        Args:
            rows: the planned rows in batch order.
            num_rows: rows of the batch, padding included.
            seq_lens: int32 [num_rows] logical lengths on the device, 0 in padding rows.

        Returns:
            One table for each layer group; views of the persistent tensors.
        """
        return [self._fill_group(group, rows, num_rows, seq_lens) for group in range(len(self._block_tables))]

    def _fill_group(self, group: int, rows: Sequence[Row], num_rows: int, seq_lens: torch.Tensor) -> CompactedTable:
        pin = self._device.type == "cuda"
        width = max(len(row.slots[group]) for row in rows)
        table = torch.zeros((len(rows), width), dtype=torch.int32, pin_memory=pin)
        evicted = torch.zeros((2, num_rows), dtype=torch.int32, pin_memory=pin)
        table_np: np.ndarray = table.numpy()
        for index, row in enumerate(rows):
            table_np[index, : len(row.slots[group])] = row.slots[group]
        evicted[0, : len(rows)] = torch.tensor([row.evicted_tokens[group] for row in rows], dtype=torch.int32)
        logical = torch.tensor([row.num_computed_tokens + row.num_tokens for row in rows], dtype=torch.int32)
        evicted[1, : len(rows)] = logical - evicted[0, : len(rows)]
        block_table = self._block_tables[group, :num_rows]
        block_table[: len(rows), :width].copy_(table, non_blocking=True)
        compacted = self._seq_lens[group, :num_rows]
        torch.sub(seq_lens, evicted[0].to(self._device, non_blocking=True), out=compacted)
        return CompactedTable(block_table, compacted, evicted[1], int(evicted[1].max()))
