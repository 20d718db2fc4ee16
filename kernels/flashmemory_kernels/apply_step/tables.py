"""The tables that `apply_step` changes, and the parts of a step's upload."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from flashmemory_kernels.common import expect_device, expect_dtype, expect_shape

# Elements of a row beside one for each layer group, of a run and of an edit.
ROW_FIELDS = 3
RUN_FIELDS = 4
EDIT_FIELDS = 3


@dataclass(frozen=True, slots=True, eq=False)
class PlaceTables:
    """The tables of all requests by place, and those of the batch by row, which attention and graphs read.

    P places of G layer groups have tables of up to K entries and W blocks. A request has a place from its first step
    to its end. All tensors lie contiguous on one device and stay where they are.

    Attributes:
        block_ids: int32 [P, W], logical blocks of each place by position.
        entries: int32 [G, P, K], slots of each place's table; the blocks that a step writes stand at its end, in order.
        block_table: int32 [G, R, K], slots of each row of the batch; columns past a row's length are not read.
        seq_lens: int32 [G, R], tokens in those slots.
        slot_mapping: int64 [G, T], where each token of the batch is written, `slot * block_size + offset`.
        query_row: int32 [T], where its queries go: see `capture_queries`.
        block_size: tokens in a block.
        num_kept: Q, queries that are kept of each place.

    Raises:
        ValueError: shape, dtype, device or strides do not match.
    """

    block_ids: torch.Tensor
    entries: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    slot_mapping: torch.Tensor
    query_row: torch.Tensor
    block_size: int
    num_kept: int

    def __post_init__(self) -> None:
        expect_shape("entries", self.entries, (None, None, None))
        num_groups, num_places, width = self.entries.shape
        expect_shape("block_ids", self.block_ids, (num_places, None))
        expect_shape("block_table", self.block_table, (num_groups, None, width))
        expect_shape("seq_lens", self.seq_lens, (num_groups, self.block_table.shape[1]))
        expect_shape("slot_mapping", self.slot_mapping, (num_groups, None))
        expect_shape("query_row", self.query_row, (self.slot_mapping.shape[1],))
        expect_dtype("slot_mapping", self.slot_mapping, torch.int64)
        for name in ("block_ids", "entries", "block_table", "seq_lens", "query_row"):
            expect_dtype(name, getattr(self, name), torch.int32)
        for name in ("block_ids", "entries", "block_table", "seq_lens", "slot_mapping", "query_row"):
            tensor: torch.Tensor = getattr(self, name)
            expect_device(name, tensor, self.entries.device)
            if not tensor.is_contiguous():
                raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


class StepCounts(NamedTuple):
    """How long the parts of a step's upload are.

    Attributes:
        num_rows: rows of the batch, padding included.
        num_runs: changes of several neighbours in a table.
        num_edits: changes of one place in a table.
        num_tokens: tokens of the batch, padding included.
    """

    num_rows: int
    num_runs: int
    num_edits: int
    num_tokens: int

    def num_elems(self, num_groups: int) -> int:
        """Elements of all parts but the values of the runs."""
        return self.num_rows * (ROW_FIELDS + num_groups) + self.num_runs * RUN_FIELDS + self.num_edits * EDIT_FIELDS
