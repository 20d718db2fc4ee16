"""Inputs of `apply_step` shared by tests and benchmarks."""

import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch

from flashmemory_kernels.apply_step.tables import PlaceTables, StepCounts

# What a test finds where nothing may be written.
POISON = -77


class StepCase(NamedTuple):
    """R rows, the last ones padding, among P places of G layer groups.

    `num_tokens` repeats over the rows that are no padding; tables hold up to `width` entries of `block_size` tokens.
    """

    num_groups: int
    num_places: int
    num_rows: int
    num_padding: int
    num_tokens: tuple[int, ...]
    width: int
    block_size: int
    num_kept: int
    num_edits: int
    num_runs: int


CASES = (
    StepCase(1, num_places=1, num_rows=1, num_padding=0, num_tokens=(1,), width=2, block_size=1, num_kept=1,
             num_edits=0, num_runs=0),
    StepCase(2, num_places=5, num_rows=4, num_padding=2, num_tokens=(1,), width=30, block_size=16, num_kept=3,
             num_edits=40, num_runs=3),
    StepCase(3, num_places=7, num_rows=5, num_padding=0, num_tokens=(1, 37, 4), width=20, block_size=5, num_kept=5,
             num_edits=1, num_runs=0),
    StepCase(1, num_places=3, num_rows=3, num_padding=1, num_tokens=(1, 600), width=1500, block_size=2, num_kept=4,
             num_edits=1500, num_runs=1),
    StepCase(2, num_places=2, num_rows=0, num_padding=0, num_tokens=(1,), width=4, block_size=4, num_kept=2,
             num_edits=3, num_runs=1),
)  # fmt: skip

# Decode steps of 64 and 256 rows of 6K tokens and of one of 500K, with half a block and its growth for each row.
BENCH_CASES = tuple(
    StepCase(1, num_places=num_rows, num_rows=num_rows, num_padding=0, num_tokens=(1,), width=width, block_size=16,
             num_kept=5, num_edits=num_rows, num_runs=0)
    for num_rows, width in ((64, 52), (256, 52), (1, 4219))
)  # fmt: skip


class StepInputs(NamedTuple):
    """Arguments of the op."""

    packed: torch.Tensor
    counts: StepCounts
    logical_lens: torch.Tensor
    tables: PlaceTables


def pack(
    rows: Sequence[Sequence[int]],
    runs: Sequence[tuple[int, int, Sequence[int]]],
    edits: Sequence[Sequence[int]],
    num_tokens: int,
) -> tuple[torch.Tensor, StepCounts]:
    """A step's upload; runs are (table, column, values)."""
    flat = list(itertools.chain.from_iterable(rows))
    offset = len(flat) + 4 * len(runs) + 3 * len(edits)
    for table, column, values in runs:
        flat += (table, column, offset, len(values))
        offset += len(values)
    flat += itertools.chain.from_iterable(edits)
    flat += itertools.chain.from_iterable(values for *_, values in runs)
    return torch.tensor(flat, dtype=torch.int32), StepCounts(len(rows), len(runs), len(edits), num_tokens)


def make_inputs(case: StepCase, device: str = "cpu") -> StepInputs:
    """Tables of random slots, outputs poisoned; of several groups the last one's row 0 is computed elsewhere."""
    rng, places = random.Random(0), list(range(case.num_places))
    rng.shuffle(places)
    rows, lens, first = [], [], 0
    for index in range(case.num_rows - case.num_padding):
        count = case.num_tokens[index % len(case.num_tokens)]
        evicted = [case.block_size * rng.randint(0, min(3, (case.width - 1) // 2)) for _ in range(case.num_groups)]
        length = max(evicted) + rng.randint(count, case.width * case.block_size - max(evicted))
        if index == 0 and case.num_groups > 1:
            evicted[-1] = -1 - evicted[-1]
        rows.append((places[index], first, count, *evicted))
        lens.append(length)
        first += count
    rows += [(-1, first, 0, *[0] * case.num_groups)] * case.num_padding
    # Runs change tables of their own
    tables = rng.sample(range((case.num_groups + 1) * case.num_places), (case.num_groups + 1) * case.num_places)
    cells = [(table, column) for table in tables[case.num_runs :] for column in range(case.width)]
    edits = [(*cell, rng.randint(1, 1 << 30)) for cell in rng.sample(cells, case.num_edits)]
    runs = []
    for table in tables[: case.num_runs]:
        column = rng.randint(0, case.width - 1)
        runs.append((table, column, [rng.randint(1, 1 << 30) for _ in range(case.width - column)]))
    packed, counts = pack(rows, runs, edits, first + case.num_padding)
    logical_lens = torch.tensor(lens + [0] * case.num_padding, dtype=torch.int32)
    return StepInputs(packed.to(device), counts, logical_lens.to(device), _tables(case, first, device))


def _tables(case: StepCase, num_tokens: int, device: str) -> PlaceTables:
    generator = torch.Generator().manual_seed(0)

    def slots(*shape: int) -> torch.Tensor:
        # So large that their product with the block size needs 64 bits.
        return torch.randint(1, (1 << 31) - 1, shape, generator=generator, dtype=torch.int32).to(device)

    def poisoned(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full(shape, POISON, dtype=dtype, device=device)

    groups, max_rows, max_tokens = case.num_groups, case.num_rows + 1, num_tokens + case.num_padding + 2
    return PlaceTables(
        block_ids=slots(case.num_places, case.width),
        entries=slots(groups, case.num_places, case.width),
        block_table=poisoned(groups, max_rows, case.width),
        seq_lens=poisoned(groups, max_rows),
        slot_mapping=poisoned(groups, max_tokens, dtype=torch.int64),
        query_row=poisoned(max_tokens),
        block_size=case.block_size,
        num_kept=case.num_kept,
    )
