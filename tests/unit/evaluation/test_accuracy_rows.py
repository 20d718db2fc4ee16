"""Files of rows are read whole or refused, and tables hold every figure that the rows have."""

import json
from pathlib import Path

import pytest

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.accuracy_rows import format_report, format_tables, load_rows, save_rows
from tests.docs.pages import DOCS
from tests.unit.evaluation.rows import make_row

ROWS = [
    make_row(selector=selector, ratio=ratio, task=task, tokens=tokens, accuracy=accuracy, resident_share=ratio)
    for selector, ratio, accuracy in (("full", 1.0, 1.0), ("streaming", 0.125, 1.0), ("exact", 0.125, 0.75))
    for tokens in (600, 1200)
    for task in ("multikey", "tracking")
]
OPTIONAL = ("batch", "score_threshold", "indexer", "fallback_share", "device_share", "device_bytes", "fallbacks")


def test_tables_hold_every_figure_and_leave_out_means_of_unfinished_lengths() -> None:
    rows = [row for row in ROWS if (row.selector, row.task, row.tokens) != ("exact", "tracking", 1200)]
    assert format_tables(rows) == (
        "### multikey\n\n"
        "| selector | ratio | tau | groups | anchors | 600 | 1,200 | resident |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| full | 1 | 16 | 1 | default | 1.000 | 1.000 | 100.0% |\n"
        "| streaming | 0.125 | 16 | 1 | default | 1.000 | 1.000 | 12.5% |\n"
        "| exact | 0.125 | 16 | 1 | default | 0.750 | 0.750 | 12.5% |\n\n"
        "### tracking\n\n"
        "| selector | ratio | tau | groups | anchors | 600 | 1,200 | resident |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| full | 1 | 16 | 1 | default | 1.000 | 1.000 | 100.0% |\n"
        "| streaming | 0.125 | 16 | 1 | default | 1.000 | 1.000 | 12.5% |\n"
        "| exact | 0.125 | 16 | 1 | default | 0.750 |  | 12.5% |\n\n"
        "### mean over the tasks\n\n"
        "| selector | ratio | tau | groups | anchors | 600 | 1,200 | resident |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| full | 1 | 16 | 1 | default | 1.000 | 1.000 | 100.0% |\n"
        "| streaming | 0.125 | 16 | 1 | default | 1.000 | 1.000 | 12.5% |\n"
        "| exact | 0.125 | 16 | 1 | default | 0.750 |  | 12.5% |"
    )


def test_what_differs_has_a_column_and_a_line_of_its_own() -> None:
    table = format_tables([make_row(), make_row(batch=1, accuracy=0.5), make_row(score_threshold=0.25, anchors=(1, 3))])
    head, _, *lines = table.splitlines()[2:]
    assert head == "| selector | ratio | tau | groups | anchors | batch | score_threshold | 600 | resident |"
    assert lines == [
        "| exact | 0.125 | 16 | 1 | default | 64 |  | 0.750 | 12.5% |",
        "| exact | 0.125 | 16 | 1 | default | 1 |  | 0.500 | 12.5% |",
        "| exact | 0.125 | 16 | 1 | 1 3 | 64 | 0.25 | 0.750 | 12.5% |",
    ]


def test_further_options_have_a_column() -> None:
    table = format_tables([make_row(), make_row(options=(("hysteresis", 0), ("index_dtype", "auto")))])
    assert "| exact | 0.125 | 16 | 1 | default | hysteresis 0, index_dtype auto | 0.750 | 12.5% |" in table
    assert "| exact | 0.125 | 16 | 1 | default |  | 0.750 | 12.5% |" in table


def test_device_bytes_have_a_column_with_a_figure_for_each_length() -> None:
    rows = [make_row(tokens=tokens, device_bytes=tokens << 16, device_share=0.4) for tokens in (1200, 600)]
    head, _, line, _ = format_tables([*rows, make_row(device_share=0.2)]).splitlines()[2:]
    assert head == (
        "| selector | ratio | tau | groups | anchors | device_share | 600 | 1,200 | resident | device MiB |"
    )
    assert line == "| exact | 0.125 | 16 | 1 | default | 0.4 | 0.750 | 0.750 | 12.5% | 37.5 / 75 |"


def test_what_was_not_measured_is_told_with_its_reason() -> None:
    unmeasured = make_row(accuracy=None, resident_share=None, not_measured="no room", ratio=-0.1)
    table = format_tables([make_row(), unmeasured, make_row(tokens=1200)])
    assert "| exact | -0.1 | 16 | 1 | default | - |  |  |" in table
    assert table.endswith("- not measured: exact at 600 tokens: no room")


def test_indexers_have_a_column_only_if_there_are_several() -> None:
    neural = [make_row(selector="neural", indexer=name) for name in ("a", "b")]
    assert "indexer" not in format_tables([make_row(), neural[0]])
    assert "| neural | 0.125 | 16 | 1 | default | b |" in format_tables([make_row(), *neural])


def test_a_report_keeps_rows_on_other_questions_apart() -> None:
    report = format_report([make_row(), make_row(questions=300, accuracy=0.5)])
    parts = report.split("## toy: ")
    assert [part.partition(" ")[0] for part in parts if part] == ["12", "300"]
    assert "0.750" in parts[1]
    assert "0.750" not in parts[2]


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    options = (("index_dtype", "auto"), ("memory_decay", 0))
    rows = [make_row(anchors=(0, 2), indexer="x", options=options), make_row(), make_row(accuracy=None)]
    save_rows(tmp_path / "new" / "rows.json", rows)
    assert load_rows(tmp_path / "new" / "rows.json") == rows
    assert load_rows(tmp_path / "none.json") == []


def test_published_rows_are_read(tmp_path: Path) -> None:
    """Those from before there were batches and thresholds, too."""
    published = json.loads((DOCS / "results" / "core.json").read_text(encoding="utf-8"))
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{name: row[name] for name in row if name not in OPTIONAL} for row in published]))
    rows = load_rows(path)
    assert len(rows) == len(published) > 100
    assert {(row.batch, row.score_threshold) for row in rows} == {(None, None)}


@pytest.mark.parametrize("content", ["{}x", '[{"task": "multikey"}]', "[1]"])
def test_a_foreign_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="resident_share"):
        load_rows(path)
