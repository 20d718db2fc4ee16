"""Inputs of `compact_tables` shared by tests and benchmarks."""

from itertools import cycle
from typing import NamedTuple

import torch


class TableCase(NamedTuple):
    """R of Rmax rows of G layer groups; `counts` repeats over (group, row), tables are W wide."""

    num_groups: int
    num_rows: int
    max_rows: int
    width: int
    counts: tuple[int, ...]


CASES = (
    TableCase(num_groups=1, num_rows=1, max_rows=1, width=1, counts=(1,)),
    TableCase(num_groups=3, num_rows=4, max_rows=7, width=20, counts=(5, 0, 20, 1, 7)),
    TableCase(num_groups=2, num_rows=3, max_rows=3, width=9000, counts=(4096, 9000, 0, 4097, 2)),
    TableCase(num_groups=1, num_rows=5, max_rows=8, width=30, counts=(0,)),
)

# 13.5 % of the blocks of 32K, 128K and 500K tokens in pages of 16; all of the longest; and no change at all.
BENCH_CASES = (
    *(
        TableCase(num_groups, num_rows=num_rows, max_rows=256, width=32768, counts=(count,))
        for count in (277, 1106, 4219)
        for num_rows, num_groups in ((1, 1), (32, 4))
    ),
    TableCase(num_groups=1, num_rows=1, max_rows=256, width=32768, counts=(31250,)),
    TableCase(num_groups=4, num_rows=256, max_rows=256, width=32768, counts=(0,)),
)

# What a test finds where nothing may be written.
POISON = -77


class TableInputs(NamedTuple):
    """Arguments of the op, the outputs poisoned."""

    packed: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    compacted_lens: torch.Tensor


def make_inputs(case: TableCase, device: str = "cpu") -> TableInputs:
    """Random slots and lengths; entry (g, r) of the header evicts 16 * (g + 2 * r) tokens."""
    generator = torch.Generator().manual_seed(0)
    header, counts = [], cycle(case.counts)
    offset = 3 * case.num_groups * case.num_rows
    for group in range(case.num_groups):
        for row in range(case.num_rows):
            count = next(counts)
            header.append((offset, count, 16 * (group + 2 * row)))
            offset += count
    slots = torch.randint(1, 1 << 20, (offset - 3 * len(header),), generator=generator, dtype=torch.int32)
    packed = torch.cat((torch.tensor(header, dtype=torch.int32).flatten(), slots))
    seq_lens = torch.randint(1 << 14, 1 << 20, (case.num_rows,), generator=generator, dtype=torch.int32)
    shape = (case.num_groups, case.max_rows, case.width)
    tables = torch.full(shape, POISON, dtype=torch.int32, device=device)
    lens = torch.full(shape[:2], POISON, dtype=torch.int32, device=device)
    return TableInputs(packed.to(device), seq_lens.to(device), tables, lens)
