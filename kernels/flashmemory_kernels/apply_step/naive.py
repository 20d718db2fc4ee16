"""Specification and CPU path of `apply_step`."""

import torch

from flashmemory_kernels.apply_step.tables import EDIT_FIELDS, ROW_FIELDS, RUN_FIELDS, PlaceTables, StepCounts


def apply_step_naive(packed: torch.Tensor, counts: StepCounts, logical_lens: torch.Tensor, tables: PlaceTables) -> None:
    """See `op.apply_step`."""
    num_groups = len(tables.entries)
    start_runs = counts.num_rows * (ROW_FIELDS + num_groups)
    start_edits = start_runs + counts.num_runs * RUN_FIELDS
    runs = packed[start_runs:start_edits].view(-1, RUN_FIELDS)
    _change_tables(packed, runs, packed[start_edits : counts.num_elems(num_groups)].view(-1, EDIT_FIELDS), tables)
    header = packed[:start_runs].view(-1, ROW_FIELDS + num_groups).long()
    lens = logical_lens[: counts.num_rows].long()
    _write_rows(header, lens, tables)
    _write_tokens(header, lens, counts.num_tokens, tables)


def _change_tables(packed: torch.Tensor, runs: torch.Tensor, edits: torch.Tensor, tables: PlaceTables) -> None:
    entries, num_tables = tables.entries.flatten(0, 1), tables.entries[:, :, 0].numel()
    for table, column, start, count in runs.tolist():
        values = packed[start : start + count]
        row = entries[table] if table < num_tables else tables.block_ids[table - num_tables]
        row[column : column + count] = values
    table, column, value = edits.T
    is_entry = table < num_tables
    entries[table[is_entry].long(), column[is_entry].long()] = value[is_entry]
    tables.block_ids[table[~is_entry].long() - num_tables, column[~is_entry].long()] = value[~is_entry]


def _write_rows(header: torch.Tensor, lens: torch.Tensor, tables: PlaceTables) -> None:
    """Lengths, and the entries that they reach."""
    place, evicted = header[:, 0], header[:, ROW_FIELDS:].T
    kept = torch.where((place >= 0) & (evicted >= 0), lens - evicted, 0)  # [G, R]
    tables.seq_lens[:, : len(header)] = kept
    num_entries = -(-kept // tables.block_size)
    width = int(num_entries.max()) if num_entries.numel() else 0
    column = torch.arange(width, device=header.device)
    into = tables.block_table[:, : len(header), :width]
    into.copy_(torch.where(column < num_entries.unsqueeze(2), tables.entries[:, place.clamp(min=0), :width], into))


def _write_tokens(header: torch.Tensor, lens: torch.Tensor, num_tokens: int, tables: PlaceTables) -> None:
    """Where the tokens of the rows are written and where their queries go; padding behind them."""
    place, first, count = header[:, 0], header[:, 1], header[:, 2]
    row = torch.repeat_interleave(count)
    position = torch.arange(len(row), device=header.device) - (first + count - lens)[row]
    size, kept = tables.block_size, tables.num_kept
    evicted = header[row, ROW_FIELDS:].T
    entry = (position - torch.where(evicted < 0, -1 - evicted, evicted)) // size  # [G, T]
    group = torch.arange(len(entry), device=header.device).unsqueeze(1)
    tables.slot_mapping[:, :num_tokens] = -1
    tables.slot_mapping[:, : len(row)] = tables.entries[group, place[row], entry].long() * size + position % size
    tables.query_row[:num_tokens] = -1
    is_kept = position >= lens[row] - kept
    tables.query_row[: len(row)] = torch.where(is_kept, place[row] * kept + position % kept, -1).int()
