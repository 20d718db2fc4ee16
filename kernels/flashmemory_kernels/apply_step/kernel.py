"""Triton kernels of `apply_step`: one changes the tables of places, the next reads them for the rows of the batch."""

# A Triton kernel's arguments are pointers and scalars of the traced program: Python has no types for them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201, PLR0913, PLR0917

import torch
import triton
import triton.language as tl

from flashmemory_kernels.apply_step.tables import EDIT_FIELDS, ROW_FIELDS, RUN_FIELDS, PlaceTables, StepCounts

CHANGE_TILE = 1024
CHANGE_WARPS = 4
# A row of 32K tokens of which 13.5 % are resident is one tile.
ROW_TILE = 512
ROW_WARPS = 4


@triton.jit
def store_change(p_entries, p_block_ids, table, column, value, m_change, num_tables, width, width_ids):
    """Put values into columns of tables; those from `num_tables` on are block ids."""
    is_entry = table < num_tables
    i_table, i_column = table.to(tl.int64), column.to(tl.int64)
    tl.store(p_entries + i_table * width + i_column, value, m_change & is_entry)
    tl.store(p_block_ids + (i_table - num_tables) * width_ids + i_column, value, m_change & (is_entry == 0))


# What a step changes differs from step to step: a value such as 1 must not compile a kernel of its own.
@triton.jit(do_not_specialize=["start_runs", "num_runs", "num_edits"])
def change_tables_kernel(
    p_packed, p_entries, p_block_ids,
    start_runs, num_runs, num_edits, num_tables, width, width_ids,
    RUN_FIELDS: tl.constexpr, EDIT_FIELDS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Change what one run says, or TILE edits."""
    i_program = tl.program_id(0)
    if i_program < num_runs:
        p_run = p_packed + start_runs + i_program * RUN_FIELDS
        run_table, first = tl.load(p_run), tl.load(p_run + 1)
        p_values, count = p_packed + tl.load(p_run + 2), tl.load(p_run + 3)
        for start in range(0, count, TILE):
            i_value = start + tl.arange(0, TILE)
            values = tl.load(p_values + i_value, i_value < count, other=0)
            store_change(
                p_entries, p_block_ids, run_table + tl.zeros((TILE,), tl.int32), first + i_value, values,
                i_value < count, num_tables, width, width_ids,
            )  # fmt: skip
    else:
        i_edit = (i_program - num_runs) * TILE + tl.arange(0, TILE)
        m_edit = i_edit < num_edits
        p_edit = p_packed + start_runs + num_runs * RUN_FIELDS + i_edit * EDIT_FIELDS
        table, column = tl.load(p_edit, m_edit, other=0), tl.load(p_edit + 1, m_edit, other=0)
        value = tl.load(p_edit + 2, m_edit, other=0)
        store_change(p_entries, p_block_ids, table, column, value, m_edit, num_tables, width, width_ids)


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def write_rows_kernel(
    p_packed, p_lens, p_entries, p_block_table, p_seq_lens, p_slots, p_query_row,
    num_rows, num_tokens, num_places, max_rows, max_tokens, width, block_size, num_kept,
    ROW_FIELDS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write one row of one layer group, its length and the slots of its tokens; the program after the rows, padding."""
    i_row, i_group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row_elems = ROW_FIELDS + tl.num_programs(1)
    p_row = p_packed + i_row * row_elems
    p_token_slots = p_slots + i_group * max_tokens
    if i_row == num_rows:
        end = 0
        if num_rows > 0:
            end = tl.load(p_row - row_elems + 1) + tl.load(p_row - row_elems + 2)
        for start in range(end, num_tokens, TILE):
            i_token = start + tl.arange(0, TILE)
            m_token = i_token < num_tokens
            tl.store(p_token_slots + i_token, tl.full((TILE,), -1, tl.int64), m_token)
            if i_group == 0:
                tl.store(p_query_row + i_token, tl.full((TILE,), -1, tl.int32), m_token)
    else:
        place, first, count = tl.load(p_row), tl.load(p_row + 1), tl.load(p_row + 2)
        evicted, length = tl.load(p_row + ROW_FIELDS + i_group), tl.load(p_lens + i_row)
        kept = tl.where((place >= 0) & (evicted >= 0), length - evicted, 0)
        evicted = tl.where(evicted < 0, -1 - evicted, evicted)
        tl.store(p_seq_lens + i_group * max_rows + i_row, kept)
        p_from = p_entries + (i_group * num_places + tl.maximum(place, 0)) * width
        p_into = p_block_table + (i_group * max_rows + i_row) * width
        num_entries = tl.cdiv(kept, block_size)
        for start in range(0, num_entries, TILE):
            i_entry = start + tl.arange(0, TILE)
            m_entry = i_entry < num_entries
            tl.store(p_into + i_entry, tl.load(p_from + i_entry, m_entry), m_entry)
        for start in range(0, count, TILE):
            i_token = start + tl.arange(0, TILE)
            m_token = i_token < count
            position = length - count + i_token
            slot = tl.load(p_from + (position - evicted) // block_size, m_token, other=0).to(tl.int64)
            tl.store(p_token_slots + first + i_token, slot * block_size + position % block_size, m_token)
            if i_group == 0:
                query_row = tl.where(position >= length - num_kept, place * num_kept + position % num_kept, -1)
                tl.store(p_query_row + first + i_token, query_row, m_token)


def apply_step_triton(
    packed: torch.Tensor, counts: StepCounts, logical_lens: torch.Tensor, tables: PlaceTables
) -> None:
    """See `op.apply_step`."""
    num_groups, num_places, width = tables.entries.shape
    num_changes = counts.num_runs + triton.cdiv(counts.num_edits, CHANGE_TILE)
    if num_changes:
        change_tables_kernel[(num_changes,)](
            packed, tables.entries, tables.block_ids,
            counts.num_rows * (ROW_FIELDS + num_groups), counts.num_runs, counts.num_edits,
            num_groups * num_places, width, tables.block_ids.shape[1],
            RUN_FIELDS=RUN_FIELDS, EDIT_FIELDS=EDIT_FIELDS, TILE=CHANGE_TILE, num_warps=CHANGE_WARPS,
        )  # fmt: skip
    write_rows_kernel[(counts.num_rows + 1, num_groups)](
        packed, logical_lens, tables.entries, tables.block_table, tables.seq_lens, tables.slot_mapping,
        tables.query_row,
        counts.num_rows, counts.num_tokens, num_places, tables.block_table.shape[1], tables.slot_mapping.shape[1],
        width, tables.block_size, tables.num_kept,
        ROW_FIELDS=ROW_FIELDS, TILE=ROW_TILE, num_warps=ROW_WARPS,
    )  # fmt: skip
