"""Compacted tables: slots in order, lengths short by exactly what was left out, padding rows empty."""

import numpy as np
import torch

from flashmemory_vllm.residency.types import Copies, Phase, Row
from flashmemory_vllm.runtime.tables import CompactedTable, StepTables, TableSizes

CPU = torch.device("cpu")
BLOCK_SIZE = 4


def make_tables(num_groups: int = 1, *, skip_streamed: bool = False) -> StepTables:
    sizes = TableSizes(num_groups, num_logical_blocks=20, block_size=BLOCK_SIZE, max_rows=4, max_tokens=16, width=8)
    return StepTables(sizes, CPU, skip_streamed=skip_streamed)


def row(slots: list[list[int]], computed: int, tokens: int, evicted: list[int], streamed: int = 0) -> Row:
    tables = tuple(np.array(group, dtype=np.int32) for group in slots)
    ids = tuple(np.arange(streamed, dtype=np.int32) for _ in slots)
    phase = Phase.PREFILL if streamed else Phase.DECODE
    return Row("request", phase, computed, tokens, tables, tables, tuple(evicted), ids)


def lens(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def fill_one(tables: StepTables, rows: list[Row], seq_lens: torch.Tensor) -> CompactedTable:
    (table,) = tables.fill(rows, len(seq_lens), seq_lens)
    return table


def test_rows_and_lengths() -> None:
    table = fill_one(make_tables(), [row([[5, 3, 9]], 99, 1, [52]), row([[7]], 0, 3, [0])], lens(100, 3, 0))
    assert table.block_table[0, :3].tolist() == [5, 3, 9]
    assert table.block_table[1, 0].item() == 7
    assert table.seq_lens.tolist() == [48, 3, 0]
    assert table.seq_lens_host.tolist() == [48, 3, 0]
    assert table.max_seq_len == 48


def test_each_group_has_its_own_table() -> None:
    first, second = make_tables(num_groups=2).fill([row([[5, 3], [2, 6, 1]], 19, 1, [12, 8])], 1, lens(20))
    assert first.block_table[0, :2].tolist() == [5, 3]
    assert second.block_table[0, :3].tolist() == [2, 6, 1]
    assert first.seq_lens.tolist() == [8]
    assert second.seq_lens.tolist() == [12]


def test_tables_keep_their_memory_between_steps() -> None:
    tables = make_tables()
    first = fill_one(tables, [row([[1]], 0, 4, [0])], lens(4))
    second = fill_one(tables, [row([[2]], 4, 1, [0])], lens(5))
    assert first.block_table.data_ptr() == second.block_table.data_ptr()
    assert first.seq_lens.data_ptr() == second.seq_lens.data_ptr()
    assert second.block_table[0, 0].item() == 2


def test_rows_that_changed_places_are_written_again() -> None:
    tables = make_tables()
    a, b = row([[1, 2]], 7, 1, [0]), row([[3]], 2, 1, [0])
    fill_one(tables, [a, b], lens(8, 3))
    fill_one(tables, [b], lens(3))
    table = fill_one(tables, [b, a], lens(3, 8))
    assert table.block_table[0, 0].item() == 3
    assert table.block_table[1, :2].tolist() == [1, 2]


def test_a_dummy_batch_in_between_does_not_leave_its_tables_behind() -> None:
    tables, a = make_tables(), row([[1, 2]], 7, 1, [0])
    fill_one(tables, [a], lens(8))
    dummy = torch.tensor([[6, 6, 6]], dtype=torch.int32)
    (table,) = tables.pass_through(dummy, lens(9), torch.tensor([25]), 9)
    assert table.block_table[0, :3].tolist() == [6, 6, 6]
    assert (table.seq_lens.tolist(), table.max_seq_len) == ([9], 9)
    assert tables.slot_mapping(0, 1).tolist() == [25]
    assert fill_one(tables, [a], lens(8)).block_table[0, :2].tolist() == [1, 2]


def test_streamed_rows_are_empty_where_they_are_computed_elsewhere() -> None:
    rows = [row([[4, 5]], 16, 8, [16], streamed=4), row([[7]], 2, 1, [0])]
    table = fill_one(make_tables(skip_streamed=True), rows, lens(24, 3))
    assert table.seq_lens.tolist() == [0, 3]
    assert fill_one(make_tables(), rows, lens(24, 3)).seq_lens.tolist() == [8, 3]


def test_slots_are_translated_through_the_blocks_that_are_written() -> None:
    tables = make_tables(num_groups=2)
    blocks = np.array([3, 7], dtype=np.int32)
    tables.learn([Copies(0, blocks, np.array([9, 1], np.int32)), Copies(1, blocks, np.array([2, 8], np.int32))])
    mapping = torch.tensor([3 * BLOCK_SIZE + 1, 7 * BLOCK_SIZE, -1])
    tables.translate(mapping)
    assert mapping.tolist() == [9 * BLOCK_SIZE + 1, BLOCK_SIZE, -1]
    assert tables.slot_mapping(0, 3).tolist() == mapping.tolist()
    assert tables.slot_mapping(1, 3).tolist() == [2 * BLOCK_SIZE + 1, 8 * BLOCK_SIZE, -1]
