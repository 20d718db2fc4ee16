"""What attention and cache writes use instead of vLLM's logical ids: block tables, lengths and slot mappings.

All of it lies in device tensors that stay where they are: a CUDA graph that was captured with them reads what a
later step has put there. Each request has its tables at a place of its own, whatever its row in the batch is; a step
uploads what has changed there, and one operation makes the rows of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from flashmemory_kernels.apply_step import ROW_FIELDS, PlaceTables, apply_step

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.asked import Ask, Asked
from flashmemory_vllm.residency.batch import Batch
from flashmemory_vllm.residency.types import IntArray
from flashmemory_vllm.runtime.changes import NO_PLACE, TableChanges
from flashmemory_vllm.runtime.uploads import UploadRing

# Values of changed tables in an upload that needs no memory of its own, 256 KiB.
RING_VALUES = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class CompactedTable:
    """One layer group's view of the batch.

    Attributes:
        block_table: int32 [R, W] device slots, the blocks that are written last; columns past a row's length are not
            read.
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
        block_size: tokens in a block.
        num_places: P, most requests that have blocks at once.
        num_kept: Q, newest queries that are kept of each place.
        max_rows: most rows of a batch, padding included.
        max_tokens: most tokens of a batch, padding included.
        width: most blocks of a request.
    """

    num_groups: int
    block_size: int
    num_places: int
    num_kept: int
    max_rows: int
    max_tokens: int
    width: int

    @property
    def num_bytes(self) -> int:
        """What the tensors take."""
        tables = (self.num_places + self.max_rows) * self.width + self.max_rows
        ids = self.num_places * self.width
        return 4 * (self.num_groups * tables + ids) + (8 * self.num_groups + 4) * self.max_tokens


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
        groups, places, rows = sizes.num_groups, sizes.num_places, sizes.max_rows
        self.sizes = sizes
        self._skip_streamed = skip_streamed

        def filled(*size: int, value: int = 0, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.full(size, value, dtype=dtype, device=device)

        self._tables = PlaceTables(
            block_ids=filled(places, sizes.width),
            entries=filled(groups, places, sizes.width),
            block_table=filled(groups, rows, sizes.width),
            seq_lens=filled(groups, rows),
            slot_mapping=filled(groups, sizes.max_tokens, value=-1, dtype=torch.int64),
            query_row=filled(sizes.max_tokens, value=-1),
            block_size=sizes.block_size,
            num_kept=sizes.num_kept,
        )
        self._changes = TableChanges(groups * places)
        self._ring = UploadRing(rows * (ROW_FIELDS + groups) + RING_VALUES, device)
        # Full blocks of each place that the device knows, and of which tenant
        self._num_known: IntArray = np.zeros(places, np.int32)
        self._known_of: IntArray = np.full(places, NO_PLACE, np.int32)
        self._bounds = torch.zeros((groups, 0), dtype=torch.int32)
        self._num_tokens = sizes.max_tokens

    def query_row(self, num_tokens: int, first_token: int = 0) -> torch.Tensor:
        """Where queries go, int32 [n] for the first n of so many tokens; a view, with -1 for those that go nowhere.

        Args:
            num_tokens: neighbours in the batch.
            first_token: the first of them. Default: 0.
        """
        return self._tables.query_row[first_token : min(first_token + num_tokens, self._num_tokens)]

    def slot_mapping(self, group: int, num_tokens: int) -> torch.Tensor:
        """Slot mapping int64 [T] of a layer group, a view of the persistent tensor."""
        return self._tables.slot_mapping[group, :num_tokens]

    @property
    def block_ids(self) -> torch.Tensor:
        """Logical blocks of each place by position, int32 [P, W], always in the same memory."""
        return self._tables.block_ids

    def know_blocks(self, asked: Asked) -> None:
        """Have the next `write` tell the device of the full blocks of these rows that it does not know yet.

        Args:
            asked: of places that are all different; a tenant's blocks only grow.
        """
        place, epoch, num_full = asked.place, asked.epoch, asked.fields[:, Ask.NUM_FULL]
        num_known = np.where(self._known_of[place] == epoch, self._num_known[place], 0)
        for row in np.flatnonzero(num_known < num_full).tolist():
            table = self.sizes.num_groups * self.sizes.num_places + int(place[row])
            self._changes.put(table, int(num_known[row]), asked.blocks_of(row)[num_known[row] :])
        self._known_of[place], self._num_known[place] = epoch, np.maximum(num_known, num_full)

    def write(self, batch: Batch, seq_lens: torch.Tensor, num_tokens: int, edits: Sequence[IntArray] = ()) -> None:
        """Write a step's batch. Tables of prefill rows are compared with what is there, those of decode rows edited.

        Args:
            batch: the planned rows, of places that are all different.
            seq_lens: int32 [R] logical lengths on the device, 0 in padding rows, which come last.
            num_tokens: tokens of the batch, padding included.
            edits: per group int32 [n, 3] of place, column and slot, all that changed in the tables of decode rows since
                the last call.

        Raises:
            IntegrityError: there are more rows than lengths, or than these tables have.
        """
        num_rows = min(len(seq_lens), self.sizes.max_rows)
        if len(batch) > num_rows:
            raise IntegrityError(f"a step has {len(batch)} rows, allowed are {num_rows} (--max-num-seqs)")
        for group, of_group in enumerate(edits):
            place, column, slot = of_group.T
            self._changes.edit(group * np.int32(self.sizes.num_places) + place, column, slot)
        for index, row in batch.prefill.items():
            for group, slots in enumerate(row.slots):
                self._changes.set(group * self.sizes.num_places + int(batch.place[index]), slots)
        header, bounds = self._header(batch, num_rows)
        packed, counts = self._changes.pack(header, num_tokens)
        apply_step(self._ring.upload(packed), counts, seq_lens, self._tables)
        self._bounds, self._num_tokens = torch.from_numpy(bounds), num_tokens

    def compacted(self, num_rows: int) -> list[CompactedTable]:
        """The batch that was written, one table for each layer group; views of the persistent tensors.

        Args:
            num_rows: rows to see, padding included.

        Raises:
            IntegrityError: fewer rows were written.
        """
        bounds = self._bounds[:, :num_rows]
        if bounds.shape[1] < num_rows:
            raise IntegrityError(f"attention over {num_rows} rows, but the step has {bounds.shape[1]}")
        return self._views(bounds, [max(1, int(bound.max())) for bound in bounds])

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
        tables, num_rows = self._tables, len(seq_lens)
        width = min(block_table.shape[1], self.sizes.width)
        tables.block_table[:, :num_rows, :width] = block_table[:num_rows, :width]
        tables.seq_lens[:, :num_rows] = seq_lens
        tables.slot_mapping[:, : len(slot_mapping)] = slot_mapping
        self._capture_nothing()
        bounds = torch.full((self.sizes.num_groups, num_rows), max_seq_len, dtype=torch.int32)
        return self._views(bounds, [max_seq_len] * self.sizes.num_groups)

    def write_nothing(self) -> None:
        """Have a batch that is nobody's leave pages and queries alone, whether or not attention hears of it."""
        self._tables.slot_mapping.fill_(-1)
        self._capture_nothing()

    def warm_up(self) -> None:
        """Compile the kernels, on a batch of padding and a table of one null slot."""
        self._changes.set(0, np.zeros(1, np.int32))
        self.write(Batch.of([], []), torch.zeros(1, dtype=torch.int32, device=self._tables.entries.device), 1)

    def reset(self) -> None:
        """Take nothing for granted that is on the device."""
        self._changes.forget()
        self._known_of[:] = NO_PLACE

    def _header(self, batch: Batch, num_rows: int) -> tuple[IntArray, IntArray]:
        """The rows [R, 3 + G] as `apply_step` reads them, and bounds [G, R] of their compacted lengths."""
        header = np.zeros((num_rows, ROW_FIELDS + self.sizes.num_groups), np.int32)
        header[len(batch) :, 0] = NO_PLACE
        bounds = np.zeros((self.sizes.num_groups, num_rows), np.int32)
        if len(batch):
            own = header[: len(batch)]
            own[:, 0], own[:, 2], own[:, ROW_FIELDS:] = batch.place, batch.num_tokens, batch.evicted_tokens
            bounds[:, : len(batch)] = batch.num_tokens + batch.num_computed_tokens - batch.evicted_tokens.T
        header[1:, 1] = np.cumsum(header[:-1, 2])
        for index, row in batch.prefill.items() if self._skip_streamed else ():
            for group in range(self.sizes.num_groups):
                if len(row.streamed[group]):
                    header[index, ROW_FIELDS + group] = -1 - row.evicted_tokens[group]
                    bounds[group, index] = 0
        return header, bounds

    def _capture_nothing(self) -> None:
        self._tables.query_row.fill_(-1)
        self._num_tokens = self.sizes.max_tokens

    def _views(self, bounds: torch.Tensor, max_seq_lens: Sequence[int]) -> list[CompactedTable]:
        num_rows = bounds.shape[1]
        return [
            CompactedTable(
                self._tables.block_table[group, :num_rows],
                self._tables.seq_lens[group, :num_rows],
                bounds[group],
                max_seq_lens[group],
            )
            for group in range(self.sizes.num_groups)
        ]
