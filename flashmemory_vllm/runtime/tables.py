"""What attention and cache writes use instead of vLLM's logical ids: block tables, lengths and slot mappings.

All of it lies in device tensors that stay where they are: a CUDA graph that was captured with them reads what a
later step has put there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from flashmemory_kernels.compact_tables import compact_tables
from flashmemory_kernels.translate_slots import translate_slots

from flashmemory_vllm.residency.types import Copies, IntArray, Row
from flashmemory_vllm.runtime.uploads import upload

# Per row and group: where its slots begin in the upload, how many they are, tokens that its table leaves out.
HEADER_WIDTH = 3


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


@dataclass(frozen=True, slots=True)
class TableSizes:
    """Sizes of the persistent tensors.

    Attributes:
        num_groups: G.
        num_logical_blocks: N.
        block_size: tokens in a block.
        max_rows: most rows of a batch, padding included.
        max_tokens: most tokens of a batch, padding included.
        width: most blocks of a request.
    """

    num_groups: int
    num_logical_blocks: int
    block_size: int
    max_rows: int
    max_tokens: int
    width: int


class StepTables:
    """One block table, one length vector and one slot mapping for each layer group.

    Only full blocks are ever left out of a table, so a row's compacted length is its logical length minus a
    multiple of the block size that the host knows exactly, even while the host only bounds the logical one.

    Args:
        sizes: of the tensors.
        device: where attention runs.
        skip_streamed: give streamed rows length 0, so that attention over the tables costs nothing for rows that
            are computed elsewhere. Default: False.
    """

    def __init__(self, sizes: TableSizes, device: torch.device, *, skip_streamed: bool = False) -> None:
        groups, rows = sizes.num_groups, sizes.max_rows
        self.sizes = sizes
        self._device = device
        self._skip_streamed = skip_streamed
        self._block_tables = torch.zeros((groups, rows, sizes.width), dtype=torch.int32, device=device)
        self._seq_lens = torch.zeros((groups, rows), dtype=torch.int32, device=device)
        self._slot_mappings = torch.full((groups, sizes.max_tokens), -1, dtype=torch.int64, device=device)
        # Slots of the blocks that are being written. Other entries may be out of date: nothing writes there.
        self._written_slots = torch.zeros((groups, sizes.num_logical_blocks), dtype=torch.int32, device=device)
        # The slots that each row of the block tables was last filled with. Equal objects hold equal slots.
        self._filled: list[list[IntArray | None]] = []
        self.reset()

    def learn(self, fresh: Sequence[Copies]) -> None:
        """Learn the slots of blocks that this step writes first; they keep them until they are full."""
        for copies in fresh:
            both = upload(np.stack((copies.blocks, copies.slots)).astype(np.int64), self._device)
            self._written_slots[copies.group].index_copy_(0, both[0], both[1].int())

    def translate(self, slot_mapping: torch.Tensor) -> None:
        """Turn logical slot indices into physical ones: group 0's in place, the others' in `slot_mapping`.

        Args:
            slot_mapping: int64 [T] or [1, T], `block * block_size + offset`; negative entries are padding and stay.
        """
        translate_slots(slot_mapping.view(-1), self._written_slots, self.sizes.block_size, self._slot_mappings)

    def slot_mapping(self, group: int, num_tokens: int) -> torch.Tensor:
        """Slot mapping int64 [T] of a layer group, a view of the persistent tensor."""
        return self._slot_mappings[group, :num_tokens]

    def fill(self, rows: Sequence[Row], num_rows: int, seq_lens: torch.Tensor) -> list[CompactedTable]:
        """Write the batch's rows.

        Args:
            rows: the planned rows in batch order.
            num_rows: rows of the batch, padding included.
            seq_lens: int32 [num_rows] logical lengths on the device, 0 in padding rows.

        Returns:
            One table for each layer group; views of the persistent tensors.
        """
        num_groups = self.sizes.num_groups
        header = np.zeros((num_groups, num_rows, HEADER_WIDTH), dtype=np.int32)
        bounds = torch.zeros((num_groups, num_rows), dtype=torch.int32)
        changed: list[IntArray] = []
        end = header.size
        for group in range(num_groups):
            filled, bound = self._filled[group], bounds[group].numpy()
            for index, row in enumerate(rows):
                logical = row.num_computed_tokens + row.num_tokens
                is_skipped = self._skip_streamed and len(row.streamed[group]) > 0
                evicted = logical if is_skipped else row.evicted_tokens[group]
                slots = row.slots[group]
                count = 0 if is_skipped or filled[index] is slots else len(slots)
                if count:
                    filled[index] = slots
                    changed.append(slots)
                header[group, index] = end, count, evicted
                bound[index] = logical - evicted
                end += count
        packed = upload(np.concatenate((header.reshape(-1), *changed)), self._device)
        compact_tables(packed, seq_lens, self._block_tables, self._seq_lens)
        return self._views(num_rows, bounds, [max(1, int(bound.max())) for bound in bounds])

    def pass_through(
        self, block_table: torch.Tensor, seq_lens: torch.Tensor, slot_mapping: torch.Tensor, max_seq_len: int
    ) -> list[CompactedTable]:
        """Take tables whose blocks are slots already: dummy batches, and batches that a graph is captured with.

        Args:
            block_table: int32 [R, w] slots.
            seq_lens: int32 [R].
            slot_mapping: int64 [T].
            max_seq_len: upper bound that the batch is to be computed with.
        """
        num_rows, width = len(seq_lens), min(block_table.shape[1], self.sizes.width)
        self._block_tables[:, :num_rows, :width] = block_table[:num_rows, :width]
        self._seq_lens[:, :num_rows] = seq_lens
        self._slot_mappings[:, : len(slot_mapping)] = slot_mapping
        self.reset()
        bounds = torch.full((self.sizes.num_groups, num_rows), max_seq_len, dtype=torch.int32)
        return self._views(num_rows, bounds, [max_seq_len] * self.sizes.num_groups)

    def warm_up(self) -> None:
        """Compile the kernels, on a batch of padding."""
        self.translate(torch.full((1,), -1, device=self._device))
        self.fill([], 1, torch.zeros(1, dtype=torch.int32, device=self._device))

    def reset(self) -> None:
        """Take nothing for granted that a row was filled with before."""
        self._filled = [[None] * self.sizes.max_rows for _ in range(self.sizes.num_groups)]

    def _views(self, num_rows: int, bounds: torch.Tensor, max_seq_lens: Sequence[int]) -> list[CompactedTable]:
        return [
            CompactedTable(
                self._block_tables[group, :num_rows],
                self._seq_lens[group, :num_rows],
                bounds[group],
                max_seq_lens[group],
            )
            for group in range(self.sizes.num_groups)
        ]
