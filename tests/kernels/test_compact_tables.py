"""compact_tables: ragged rows land where they belong, and nothing else changes."""

from itertools import cycle

import pytest
import torch
from flashmemory_kernels.compact_tables import compact_tables
from flashmemory_kernels.compact_tables.cases import CASES, POISON, TableCase, make_inputs


@pytest.mark.parametrize("case", CASES)
def test_rows_and_lengths_are_written(case: TableCase) -> None:
    inputs, counts = make_inputs(case), cycle(case.counts)
    compact_tables(*inputs)
    packed = inputs.packed.tolist()
    position = 3 * case.num_groups * case.num_rows
    for group in range(case.num_groups):
        for row in range(case.num_rows):
            count = next(counts)
            slots = inputs.block_tables[group, row].tolist()
            assert slots == packed[position : position + count] + [POISON] * (case.width - count)
            position += count
            assert inputs.compacted_lens[group, row] == inputs.seq_lens[row] - 16 * (group + 2 * row)
    assert bool((inputs.block_tables[:, case.num_rows :] == POISON).all())
    assert bool((inputs.compacted_lens[:, case.num_rows :] == POISON).all())


def test_a_row_without_slots_keeps_the_table_of_the_step_before() -> None:
    inputs = make_inputs(CASES[1])
    compact_tables(*inputs)
    before = inputs.block_tables.clone()
    header = inputs.packed[:36].view(12, 3)
    header[:, 1] = 0
    header[:, 2] += 1
    lens = inputs.compacted_lens.clone()
    compact_tables(*inputs)
    assert torch.equal(inputs.block_tables, before)
    assert torch.equal(inputs.compacted_lens[:, :4], lens[:, :4] - 1)


def test_wrong_arguments_are_named() -> None:
    packed, seq_lens, tables, lens = make_inputs(CASES[1])
    with pytest.raises(ValueError, match=r"packed: expected a header of 36 elements, got 35 elements"):
        compact_tables(packed[:35], seq_lens, tables, lens)
    with pytest.raises(ValueError, match=r"seq_lens: expected at most 7 rows, got 8"):
        compact_tables(packed, seq_lens.repeat(2), tables, lens)
    with pytest.raises(ValueError, match=r"compacted_lens: expected shape \[3, 7\], got \[3, 4\]"):
        compact_tables(packed, seq_lens, tables, lens[:, :4])
    with pytest.raises(ValueError, match=r"seq_lens: expected dtype torch.int32, got torch.int64"):
        compact_tables(packed, seq_lens.long(), tables, lens)
    with pytest.raises(ValueError, match=r"block_tables: expected a last dim of stride 1"):
        compact_tables(packed, seq_lens, torch.zeros(3, 20, 7, dtype=torch.int32).mT, lens)
