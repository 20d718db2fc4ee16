"""What differs between tables on the device and tables that are wanted there, packed with a step's rows."""

import numpy as np
from flashmemory_kernels.apply_step import EDIT_FIELDS, ROW_FIELDS, RUN_FIELDS, StepCounts

from flashmemory_vllm.residency.types import NOTHING, IntArray

# In rows of padding.
NO_PLACE = -1
# Of a table that is no longer than this, 4 KiB, looking for what differs costs the host more than uploading all of it.
SHORT = 1024


class TableChanges:
    """Knows what each table on the device holds, and says what a step changes there.

    Args:
        num_tables: tables, numbered as in `apply_step`.
    """

    def __init__(self, num_tables: int) -> None:
        self._known: list[IntArray] = [NOTHING] * num_tables
        self._is_known = np.zeros(num_tables, np.bool_)
        # Per run: its table, its first column, its values
        self._runs: tuple[list[int], list[int], list[IntArray]] = ([], [], [])
        self._edits: list[IntArray] = []

    def set(self, table: int, wanted: IntArray) -> None:
        """Have a table begin with these values from the next `pack` on.

        Args:
            table: its number; once in a step.
            wanted: int32 `[n]`, not changed later. An array that was given before holds what it held.
        """
        known = self._known[table]
        if known is wanted:
            return
        self._known[table], self._is_known[table] = wanted, True
        if wanted.size <= SHORT:
            self._add_run(table, 0, wanted)
            return
        common = min(known.size, wanted.size)
        changed = np.flatnonzero(known[:common] != wanted[:common]).astype(np.int32)
        first = int(changed[0]) if changed.size else common
        if EDIT_FIELDS * (changed.size + wanted.size - common) > RUN_FIELDS + wanted.size - first:
            self._add_run(table, first, wanted[first:])
        elif changed.size or common < wanted.size:
            columns = np.concatenate((changed, np.arange(common, wanted.size, dtype=np.int32)))
            edits = np.empty((columns.size, EDIT_FIELDS), np.int32)
            edits[:, 0], edits[:, 1], edits[:, 2] = table, columns, wanted[columns]
            self._edits.append(edits)

    def put(self, table: int, first: int, values: IntArray) -> None:
        """Have a table hold these values from a column on, whatever it held.

        Args:
            table: its number, of no table that is `set`.
            first: the column.
            values: int32 `[n]`.
        """
        self._add_run(table, first, values.copy())

    def edit(self, tables: IntArray, columns: IntArray, values: IntArray) -> None:
        """Have single values of tables changed by the next `pack`; nothing is known of the rest of them any more.

        Args:
            tables: int32 `[n]` numbers; none of them is set in the same step.
            columns: int32 `[n]`.
            values: int32 `[n]`, the same where a column is given twice.
        """
        if tables.size:
            self._edits.append(np.stack((tables, columns, values), axis=1))
            for table in tables[self._is_known[tables]].tolist():
                self._known[table], self._is_known[table] = NOTHING, False

    def pack(self, rows: IntArray, num_tokens: int) -> tuple[IntArray, StepCounts]:
        """The upload of a step; its changes count as made.

        Args:
            rows: int32 `[num_rows, ROW_FIELDS + G]`.
            num_tokens: tokens of the batch, padding included.
        """
        (tables, firsts, values), edits = self._runs, self._edits
        counts = StepCounts(len(rows), len(tables), sum(map(len, edits)), num_tokens)
        if not tables and not edits:
            return rows.reshape(-1), counts
        self._runs, self._edits = ([], [], []), []
        runs = np.empty((len(tables), RUN_FIELDS), np.int32)
        runs[:, 0], runs[:, 1], runs[:, 3] = tables, firsts, [each.size for each in values]
        runs[:, 2] = counts.num_elems(rows.shape[1] - ROW_FIELDS) + np.cumsum(runs[:, 3]) - runs[:, 3]
        parts = [rows.reshape(-1), runs.reshape(-1), *(edit.reshape(-1) for edit in edits), *values]
        return np.concatenate(parts), counts

    def forget(self) -> None:
        """Take nothing for granted that is on the device."""
        self._known = [NOTHING] * len(self._known)
        self._is_known[:] = False

    def _add_run(self, table: int, first: int, values: IntArray) -> None:
        if values.size:
            tables, firsts, all_values = self._runs
            tables.append(table)
            firsts.append(first)
            all_values.append(values)
