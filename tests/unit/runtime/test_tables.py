"""Compacted tables: slots in order, lengths short by exactly what was left out, padding rows empty."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.asked import Asked, AskedRow
from flashmemory_vllm.residency.batch import Batch
from flashmemory_vllm.residency.types import Phase, Row
from flashmemory_vllm.runtime.tables import CompactedTable, StepTables, TableSizes

CPU = torch.device("cpu")
BLOCK_SIZE = 4


def make_tables(num_groups: int = 1, *, skip_streamed: bool = False) -> StepTables:
    sizes = TableSizes(num_groups, BLOCK_SIZE, num_places=5, num_kept=3, max_rows=4, max_tokens=16, width=8)
    return StepTables(sizes, CPU, skip_streamed=skip_streamed)


def row(slots: list[list[int]], computed: int, tokens: int, evicted: list[int], streamed: int = 0) -> Row:
    tables = tuple(np.array(group, dtype=np.int32) for group in slots)
    ids = tuple(np.arange(streamed, dtype=np.int32) for _ in slots)
    return Row("request", Phase.PREFILL, computed, tokens, tables, tables, tuple(evicted), ids)


def lens(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def written(
    tables: StepTables, rows: list[Row], seq_lens: torch.Tensor, places: Sequence[int] = (), padding: int = 0
) -> list[CompactedTable]:
    """The tables of a step; rows have the first places unless given."""
    num_tokens = sum(each.num_tokens for each in rows) + padding
    tables.write(Batch.of(rows, places or range(len(rows))), seq_lens, num_tokens)
    return tables.compacted(len(seq_lens))


def asked(*rows: tuple[int, int, list[int]]) -> Asked:
    """Rows of these places, tenants and full blocks."""
    ids = np.zeros((4, 8), np.int32)
    for place, _, of_row in rows:
        ids[place, : len(of_row)] = of_row
    return Asked.of([AskedRow("", place, tenant, 0, 0, len(own), 0, 0, 0, 0, 0) for place, tenant, own in rows], ids)


def test_rows_and_lengths() -> None:
    (table,) = written(make_tables(), [row([[5, 3, 9]], 60, 1, [52]), row([[7]], 0, 3, [0])], lens(61, 3, 0))
    assert table.block_table[0, :3].tolist() == [5, 3, 9]
    assert table.block_table[1, 0].item() == 7
    assert table.seq_lens.tolist() == [9, 3, 0]
    assert table.seq_lens_host.tolist() == [9, 3, 0]
    assert table.max_seq_len == 9


def test_each_group_has_its_own_table() -> None:
    tables = make_tables(num_groups=2)
    first, second = written(tables, [row([[5, 3], [2, 6, 1]], 19, 1, [12, 8])], lens(20), [3])
    assert first.block_table[0, :2].tolist() == [5, 3]
    assert second.block_table[0, :3].tolist() == [2, 6, 1]
    assert first.seq_lens.tolist() == [8]
    assert second.seq_lens.tolist() == [12]
    assert tables.slot_mapping(0, 1).tolist() == [3 * BLOCK_SIZE + 3]
    assert tables.slot_mapping(1, 1).tolist() == [1 * BLOCK_SIZE + 3]


def test_tables_keep_their_memory_between_steps() -> None:
    tables = make_tables()
    (first,) = written(tables, [row([[1]], 0, 4, [0])], lens(4))
    (second,) = written(tables, [row([[1, 2]], 4, 1, [0])], lens(5))
    assert first.block_table.data_ptr() == second.block_table.data_ptr()
    assert first.seq_lens.data_ptr() == second.seq_lens.data_ptr()
    assert second.block_table[0, :2].tolist() == [1, 2]


def test_rows_have_the_tables_of_their_places_in_any_order() -> None:
    tables = make_tables()
    a, b = row([[1, 2]], 7, 1, [0]), row([[3]], 2, 1, [0])
    written(tables, [a, b], lens(8, 3), [4, 0])
    written(tables, [b], lens(3), [0])
    (table,) = written(tables, [b, a], lens(3, 8), [0, 4])
    assert table.block_table[0, 0].item() == 3
    assert table.block_table[1, :2].tolist() == [1, 2]


def test_tables_of_decode_rows_change_by_edits_alone() -> None:
    tables = make_tables(num_groups=2)
    both = row([[1, 2, 3], [4, 5, 6]], 11, 1, [0, 0])
    written(tables, [both], lens(12), [2])
    both.phase, both.slots = Phase.DECODE, tuple(np.full(3, 9, np.int32) for _ in range(2))
    edits = [np.array(of_group, np.int32).reshape(-1, 3) for of_group in ([(2, 1, 7)], [(2, 0, 8), (2, 2, 9)])]
    tables.write(Batch.of([both], [2]), lens(13), 1, edits)
    assert [table.block_table[0, :3].tolist() for table in tables.compacted(1)] == [[1, 7, 3], [8, 5, 9]]
    # Of what was edited nothing is taken for granted
    both.phase, both.slots = Phase.PREFILL, tuple(np.array([1, 2, 3], np.int32) for _ in range(2))
    assert written(tables, [both], lens(12), [2])[1].block_table[0, :3].tolist() == [1, 2, 3]


def test_the_next_tenant_of_a_place_has_its_own_table() -> None:
    tables = make_tables()
    written(tables, [row([[1, 2, 3]], 11, 1, [0])], lens(12), [2])
    (table,) = written(tables, [row([[1, 5]], 7, 1, [0])], lens(8), [2])
    assert table.block_table[0, :2].tolist() == [1, 5]


def test_a_dummy_batch_in_between_does_not_leave_its_tables_behind() -> None:
    tables, a = make_tables(), row([[1, 2]], 7, 1, [0])
    written(tables, [a], lens(8))
    dummy = torch.tensor([[6, 6, 6]], dtype=torch.int32)
    (table,) = tables.pass_through(dummy, lens(9), torch.tensor([25]), 9)
    assert table.block_table[0, :3].tolist() == [6, 6, 6]
    assert (table.seq_lens.tolist(), table.max_seq_len) == ([9], 9)
    assert tables.slot_mapping(0, 1).tolist() == [25]
    assert (tables.query_row(16) == -1).all()
    assert written(tables, [a], lens(8))[0].block_table[0, :2].tolist() == [1, 2]


def test_streamed_rows_are_empty_where_they_are_computed_elsewhere() -> None:
    rows = [row([[4, 5]], 16, 8, [16], streamed=4), row([[7]], 2, 1, [0])]
    tables = make_tables(skip_streamed=True)
    (table,) = written(tables, rows, lens(24, 3))
    assert table.seq_lens.tolist() == [0, 3]
    assert table.seq_lens_host.tolist() == [0, 3]
    # They are written all the same
    assert tables.slot_mapping(0, 9).tolist() == [*range(16, 24), 7 * BLOCK_SIZE + 2]
    assert written(make_tables(), rows, lens(24, 3))[0].seq_lens.tolist() == [8, 3]


def test_tokens_are_written_into_the_blocks_at_the_end_and_padding_nowhere() -> None:
    tables = make_tables(num_groups=2)
    rows = [row([[9, 1], [2, 8]], 21, 2, [16, 16]), row([[3], [4]], 0, 3, [0, 0])]
    written(tables, rows, lens(23, 3), [1, 4], padding=2)
    assert tables.slot_mapping(0, 7).tolist() == [5, 6, 12, 13, 14, -1, -1]
    assert tables.slot_mapping(1, 7).tolist() == [33, 34, 16, 17, 18, -1, -1]
    assert tables.query_row(7).tolist() == [1 * 3 + 0, 1 * 3 + 1, 4 * 3 + 0, 4 * 3 + 1, 4 * 3 + 2, -1, -1]
    assert tables.query_row(3, first_token=2).tolist() == [4 * 3 + 0, 4 * 3 + 1, 4 * 3 + 2]


def test_nobodys_batch_writes_nothing() -> None:
    tables = make_tables(num_groups=2)
    written(tables, [row([[9], [2]], 0, 3, [0, 0])], lens(3))
    tables.write_nothing()
    assert (tables.slot_mapping(1, 16) == -1).all()
    assert (tables.query_row(16) == -1).all()


def test_more_rows_than_the_tables_have_are_refused() -> None:
    rows = [row([[1]], 0, 1, [0])] * 5
    with pytest.raises(IntegrityError, match=r"a step has 5 rows, allowed are 4 \(--max-num-seqs\)"):
        make_tables().write(Batch.of(rows, range(5)), lens(*[1] * 5), 5)
    tables = make_tables()
    written(tables, rows[:2], lens(1, 1))
    with pytest.raises(IntegrityError, match="attention over 3 rows, but the step has 2"):
        tables.compacted(3)


def test_warming_up_leaves_nothing_wrong_behind() -> None:
    tables = make_tables()
    tables.warm_up()
    (table,) = written(tables, [row([[1, 2]], 7, 1, [0])], lens(8))
    assert table.block_table[0, :2].tolist() == [1, 2]


def test_logical_blocks_are_written_beside_the_tables() -> None:
    tables = make_tables(num_groups=2)
    # Of the first tenant of place 3 only new ones are sent: what is known does not change
    for tenant, ids, known in ((0, [9, 4], [9, 4]), (0, [1, 4, 7], [9, 4, 7]), (1, [6], [6, 4, 7])):
        tables.know_blocks(asked((3, tenant, ids), (1, 5, [8])))
        written(tables, [row([[5, 3], [2, 6]], 4, 1, [0, 0])], lens(5), [3])
        assert tables.block_ids[3, : len(known)].tolist() == known
        assert tables.block_ids[1, 0].item() == 8
    tables.reset()
    tables.know_blocks(asked((3, 1, [2])))
    written(tables, [row([[5, 3], [2, 6]], 4, 1, [0, 0])], lens(5), [3])
    assert tables.block_ids[3, 0].item() == 2
