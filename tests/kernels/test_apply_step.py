"""apply_step: changes land where they belong, rows read them, and tokens are written into the blocks of their row."""

import pytest
import torch
from flashmemory_kernels.apply_step import PlaceTables, StepCounts, apply_step
from flashmemory_kernels.apply_step.cases import CASES, POISON, StepCase, make_inputs, pack


def changed(packed: list[int], counts: StepCounts, tables: PlaceTables) -> list[list[int]]:
    """All tables after runs and edits, one cell at a time: entries by group and place, then block ids."""
    num_groups = len(tables.entries)
    rows = [*tables.entries.flatten(0, 1).tolist(), *tables.block_ids.tolist()]
    start = counts.num_rows * (3 + num_groups)
    for index in range(counts.num_runs):
        table, column, offset, count = packed[start + 4 * index : start + 4 * index + 4]
        rows[table][column : column + count] = packed[offset : offset + count]
    start += 4 * counts.num_runs
    for index in range(counts.num_edits):
        table, column, value = packed[start + 3 * index : start + 3 * index + 3]
        rows[table][column] = value
    return rows


@pytest.mark.parametrize("case", CASES)
def test_changes_hit_the_tables_of_their_places(case: StepCase) -> None:
    packed, counts, lens, tables = make_inputs(case)
    expected = changed(packed.tolist(), counts, tables)
    apply_step(packed, counts, lens, tables)
    num_entry_tables = case.num_groups * case.num_places
    assert tables.entries.flatten(0, 1).tolist() == expected[:num_entry_tables]
    assert tables.block_ids.tolist() == expected[num_entry_tables:]


@pytest.mark.parametrize("case", CASES)
def test_rows_of_the_batch_one_at_a_time(case: StepCase) -> None:
    packed, counts, lens, tables = make_inputs(case)
    apply_step(packed, counts, lens, tables)
    header = packed[: case.num_rows * (3 + case.num_groups)].view(case.num_rows, 3 + case.num_groups).tolist()
    slots: dict[tuple[int, int], int] = {}
    query_rows: dict[int, int] = {}
    for row, (place, first, count, *given) in enumerate(header):
        evicted = [-1 - tokens if tokens < 0 else tokens for tokens in given]
        length, size, kept = int(lens[row]), case.block_size, case.num_kept
        for group in range(case.num_groups):
            left = 0 if place < 0 or given[group] < 0 else length - evicted[group]
            num_entries = -(-left // size)
            assert tables.seq_lens[group, row] == left
            entries = tables.entries[group, place].tolist()[:num_entries]
            assert tables.block_table[group, row].tolist() == entries + [POISON] * (case.width - num_entries)
            for index in range(count):
                position = length - count + index
                slot = int(tables.entries[group, place, position // size - evicted[group] // size])
                slots[group, first + index] = slot * size + position % size
        for index in range(count):
            position = length - count + index
            query_rows[first + index] = place * kept + position % kept if position >= length - kept else -1
    written, behind = counts.num_tokens, tables.slot_mapping.shape[1] - counts.num_tokens
    for group, mapping in enumerate(tables.slot_mapping.tolist()):
        assert mapping == [slots.get((group, token), -1) for token in range(written)] + [POISON] * behind
    assert tables.query_row.tolist() == [query_rows.get(token, -1) for token in range(written)] + [POISON] * behind
    assert bool((tables.block_table[:, case.num_rows :] == POISON).all())
    assert bool((tables.seq_lens[:, case.num_rows :] == POISON).all())


def test_a_block_that_comes_takes_the_entry_of_one_that_goes_and_growth_goes_behind() -> None:
    """Blocks of 4; place 1 holds positions 0, 2, 5 of 6 blocks and begins block 6, while 2 makes room for 3."""
    tables = make_inputs(StepCase(1, 2, 1, 0, (1,), 8, 4, 3, 0, 0)).tables
    tables.entries[0, 1, :3] = torch.tensor([10, 20, 50])
    packed, counts = pack([(1, 0, 1, 12)], [], [(1, 1, 30), (1, 3, 60), (3, 6, 1006)], num_tokens=1)
    apply_step(packed, counts, torch.tensor([25], dtype=torch.int32), tables)
    assert tables.block_table[0, 0, :4].tolist() == [10, 30, 50, 60]
    assert tables.seq_lens[0, 0] == 13
    assert tables.slot_mapping[0, 0] == 60 * 4
    assert tables.query_row[0] == 1 * 3 + 24 % 3
    assert tables.block_ids[1, 6] == 1006


def test_wrong_arguments_are_named() -> None:
    packed, counts, lens, tables = make_inputs(CASES[1])
    with pytest.raises(ValueError, match=r"counts: expected at most 4 rows, got 5"):
        apply_step(packed, counts._replace(num_rows=5), lens, tables)
    with pytest.raises(ValueError, match=r"counts: expected at most 151 elements in packed, got 152"):
        apply_step(packed[:151], counts, lens, tables)
    with pytest.raises(ValueError, match=r"counts: expected at most 6 tokens, got 7"):
        apply_step(packed, counts._replace(num_tokens=7), lens, tables)
    with pytest.raises(ValueError, match=r"logical_lens: expected dtype torch.int32, got torch.int64"):
        apply_step(packed, counts, lens.long(), tables)


def test_tables_that_do_not_fit_each_other_are_named() -> None:
    tables = make_inputs(CASES[1]).tables
    fields = {name: getattr(tables, name) for name in PlaceTables.__slots__}
    with pytest.raises(ValueError, match=r"block_table: expected shape \[2, \*, 30\], got \[2, 5, 29\]"):
        PlaceTables(**{**fields, "block_table": tables.block_table[:, :, :29]})
    with pytest.raises(ValueError, match=r"block_ids: expected a contiguous tensor"):
        PlaceTables(**{**fields, "block_ids": tables.block_ids.mT.contiguous().mT})
    with pytest.raises(ValueError, match=r"slot_mapping: expected dtype torch.int64, got torch.int32"):
        PlaceTables(**{**fields, "slot_mapping": tables.slot_mapping.int()})
