"""A row says what is wrong with the engine and with the soak; it comes back from its file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.provenance import Provenance
from flashmemory_vllm.soak.report import Cell, format_report, make_row
from flashmemory_vllm.soak.rows import SoakRow, load_rows, save_rows
from tests.unit.soak.traces import settings

PROVENANCE = Provenance("flashmemory soak", "abc", "x86_64", {"vllm": "0.32.0"})
COUNTED = ("preemptions", "evictions_total", "recalled_blocks_total", "prefetched_blocks_total", "selections_total")
COUNTERS = dict.fromkeys((*COUNTED, "streamed_blocks_total", "prefix_hit_tokens"), 5.0)
OUTCOME: dict[str, Any] = {
    "added": 60,
    "finished": 50,
    "aborted": 10,
    "hanging": [],
    "steps": 900,
    "seconds": 12.34,
    "peaks": {"host_blocks": 640.0, "running": 7},
    "measured": [{"rss_mib": 1000.0, "device_mib": 8.0, "pinned_mib": 2.0}] * 2,
    "counters": COUNTERS,
    "leaks": {"leaked_slots": 0, "leaked_blocks": 0, "leaked_entries": []},
    "machinery": {"cuda_graphs": "FULL_AND_PIECEWISE"},
}
VERDICT = {"tokens": 1234, "token_differences": 0, "identical": 70, "texts": 70, "wrong": []}
VERDICT |= {"largest_deficit": 0.0, "control_deficit": 0.0, "tolerance": 1e-3}


def row(phase: str = "dense", outcome: dict[str, Any] | None = OUTCOME, error: str | None = None) -> SoakRow:
    cell = Cell(settings(phase=phase, is_async=True), "toy", 0.9, PROVENANCE)
    verdict = VERDICT if phase == "dense" and error is None else None
    return make_row(cell, outcome, verdict, (70, 66), error, has_hung=error is not None)


def test_a_good_cell_has_no_problem() -> None:
    assert row().problems() == []
    assert (row().requests, row().token_differences, row().overcommit) == (60, 0, 10.0)
    sparse = row("sparse")
    assert sparse.problems() == []
    assert (sparse.token_differences, sparse.answers_right, sparse.tolerance) == (None, 0.9429, None)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"token_differences": 3}, "3 tokens differ"),
        ({"token_differences": None, "tokens": None}, "no text was compared"),
        ({"texts": 0}, "no text was compared"),
        ({"leaked_slots": 2}, "2 slots leaked"),
        ({"leaked_blocks": -1}, "-1 blocks leaked"),
        ({"leaked_entries": 4}, "4 entries of requests that are gone"),
        ({"hangs": 1, "finished": 49}, "1 hangs"),
        ({"finished": 49}, "requests are lost"),
        ({"rss_mib_end": 1100.0}, "process memory grew from 1000.0 to 1100.0 MiB"),
        ({"device_mib_end": 8.5}, "device memory grew from 8.0 to 8.5 MiB"),
        ({"pinned_mib_end": 3.0}, "pinned memory grew from 2.0 to 3.0 MiB"),
        ({"evictions": 0}, "no evictions"),
        ({"recalls": 0}, "no recalls"),
        ({"preemptions": 0}, "no preemptions"),
        ({"aborted": 0, "finished": 60}, "no aborts"),
    ],
)
def test_each_fault_is_told(change: dict[str, Any], problem: str) -> None:
    assert replace(row(), **change).problems() == [problem]


def test_too_few_right_answers_are_a_problem() -> None:
    assert replace(row("sparse"), answers_right=0.85).problems() == ["0.85 of the answers are right, 0.9 are expected"]


def test_an_engine_that_failed_is_a_row_with_its_reason() -> None:
    failed = row(outcome=None, error="serve: exit code 1\nRuntimeError: no")
    assert (failed.requests, failed.hangs, failed.leaked_slots) == (0, 1, None)
    assert {"serve: exit code 1\nRuntimeError: no", "1 hangs", "None slots leaked"} <= set(failed.problems())


def test_rows_come_back_and_async_has_its_name_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.json"
    assert load_rows(path) == []
    save_rows(path, [row(), row("sparse")])
    assert load_rows(path) == [row(), row("sparse")]
    written = json.loads(path.read_text())[0]
    required = ("requests", "seconds", "token_differences", "leaked_slots", "leaked_blocks", "hangs", "overcommit")
    assert {*required, "runner", "async", "commit"} <= set(written)
    assert written["async"] is True


@pytest.mark.parametrize("text", ["{}x", "[1]", '[{"phase": "dense"}]'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"--out {path} does not hold rows of a soak"):
        load_rows(path)


def test_the_report_has_a_line_for_each_row_and_sums() -> None:
    told = format_report([row(), replace(row("sparse"), hangs=1, finished=49)])
    assert told.startswith("120 requests in 25 s; 1234 tokens compared with dense attention's.\n\n| phase |")
    lines = told.splitlines()[4:]
    assert lines[0].startswith("| dense | v1 | True | float32 | 1.0 | full | 60 | 12.3 | 70 | 0 |  | 0 | 0 | 0 | 0 |")
    assert lines[0].endswith("| none |")
    assert lines[1].endswith("| 1 hangs |")


def test_memory_is_compared_with_that_after_four_fifths() -> None:
    points = [{"rss_mib": value, "device_mib": 1.0, "pinned_mib": 0.0} for value in (100.0, 200.0, 300.0, 310.0, 312.0)]
    grown = row(outcome=OUTCOME | {"measured": points})
    assert (grown.rss_mib_start, grown.rss_mib_end) == (310.0, 312.0)
    assert grown.problems() == []
