"""What is uploaded makes the tables on the device those that are wanted, and is no more than what differs."""

import numpy as np
import pytest
from flashmemory_kernels.apply_step import EDIT_FIELDS, ROW_FIELDS, RUN_FIELDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashmemory_vllm.residency.types import IntArray
from flashmemory_vllm.runtime import changes
from flashmemory_vllm.runtime.changes import TableChanges

NUM_TABLES, WIDTH = 3, 12
NO_ROWS = np.zeros((0, ROW_FIELDS + 1), np.int32)


class Device:
    """Tables that are changed by what `TableChanges` packs, one value at a time."""

    def __init__(self) -> None:
        self.changes = TableChanges(NUM_TABLES)
        self.tables = np.zeros((NUM_TABLES, WIDTH), np.int32)

    def upload(self, rows: IntArray = NO_ROWS) -> tuple[int, int]:
        """Apply what has changed; how many runs and edits it took."""
        packed, counts = self.changes.pack(rows, 0)
        runs = packed[rows.size :][: RUN_FIELDS * counts.num_runs].reshape(-1, RUN_FIELDS)
        edits = packed[rows.size + runs.size :][: EDIT_FIELDS * counts.num_edits].reshape(-1, EDIT_FIELDS)
        touched = [(table, first + index) for table, first, _, count in runs for index in range(count)]
        touched += [(table, column) for table, column, _ in edits]
        assert len(set(touched)) == len(touched), "which of two changes wins is open"
        for table, first, start, count in runs:
            self.tables[table, first : first + count] = packed[start : start + count]
        self.tables[edits[:, 0], edits[:, 1]] = edits[:, 2]
        assert packed[: rows.size].tolist() == rows.flatten().tolist()
        assert packed.size == rows.size + runs.size + edits.size + runs[:, 3].sum()
        return counts.num_runs, counts.num_edits


def table(*values: int) -> IntArray:
    return np.array(values, np.int32)


values = st.lists(st.integers(1, 3), max_size=WIDTH)
steps = st.lists(st.dictionaries(st.integers(0, NUM_TABLES - 1), values, max_size=NUM_TABLES), max_size=8)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of the tests are long."""
    monkeypatch.setattr(changes, "SHORT", 2)


@given(steps, st.integers(0, 3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tables_begin_with_what_is_wanted(wanted: list[dict[int, list[int]]], num_rows: int) -> None:
    device, now = Device(), dict[int, list[int]]()
    rows = np.arange(num_rows * (ROW_FIELDS + 1), dtype=np.int32).reshape(num_rows, ROW_FIELDS + 1)
    for step in wanted:
        for index, given_now in step.items():
            device.changes.set(index, table(*given_now))
        device.upload(rows)
        now |= step
        for index, expected in now.items():
            assert device.tables[index, : len(expected)].tolist() == expected


def test_only_what_differs_is_uploaded() -> None:
    device = Device()
    first = table(5, 6, 7, 8, 9, 10)
    device.changes.set(1, first)
    assert device.upload() == (1, 0)
    device.changes.set(1, first)
    device.changes.set(2, table())
    assert device.upload() == (0, 0)
    device.changes.set(1, first.copy())
    assert device.upload() == (0, 0)
    device.changes.set(1, table(5, 6, 7, 8, 9, 10, 11))  # a block is begun
    assert device.upload() == (0, 1)
    device.changes.set(1, table(5, 60, 7, 8, 9, 10, 11))  # one comes for another
    assert device.upload() == (0, 1)
    device.changes.set(1, table(5, 7, 8, 9, 10, 11, 12))  # all behind one that goes move up
    assert device.upload() == (1, 0)
    assert device.tables[1, :7].tolist() == [5, 7, 8, 9, 10, 11, 12]


def test_short_tables_are_uploaded_whole() -> None:
    device = Device()
    for values_now in ((5, 6), (5, 7), (5,)):
        device.changes.set(1, table(*values_now))
        assert device.upload() == (1, 0)
    assert device.tables[1, :2].tolist() == [5, 7]


def test_what_was_forgotten_is_uploaded_again() -> None:
    device, wanted = Device(), table(5, 6)
    device.changes.set(0, wanted)
    device.upload()
    device.tables[:] = 0
    device.changes.forget()
    device.changes.set(0, wanted)
    device.upload()
    assert device.tables[0, :2].tolist() == [5, 6]


def test_values_are_put_behind_those_that_are_there() -> None:
    device = Device()
    ids = table(5, 6)
    device.changes.put(1, 0, ids)
    ids[:] = 0  # what is given may change later
    assert device.upload() == (1, 0)
    device.changes.put(1, 2, table(7))
    device.upload()
    assert device.tables[1, :3].tolist() == [5, 6, 7]


def test_of_an_edited_table_nothing_is_taken_for_granted() -> None:
    device, wanted = Device(), table(5, 6, 7)
    device.changes.set(1, wanted)
    device.upload()
    device.changes.edit(table(1, 2), table(1, 0), table(9, 4))
    assert device.upload() == (0, 2)
    assert (device.tables[1, :3].tolist(), device.tables[2, 0]) == ([5, 9, 7], 4)
    device.changes.set(1, wanted)
    assert device.upload() == (1, 0)
    assert device.tables[1, :3].tolist() == [5, 6, 7]
