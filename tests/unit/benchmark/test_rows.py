"""Rows stand beside stock's, survive an interrupted run, and print as a table."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from flashmemory_vllm.benchmark.rows import format_tables, load_rows, measured_fields, save_rows, with_comparisons
from flashmemory_vllm.errors import ConfigError
from tests.unit.benchmark.twins import make_row


def test_a_ratio_above_one_is_better_whatever_the_metric() -> None:
    rows = with_comparisons(
        [
            make_row(engine="stock", p50_ms=20.0),
            make_row(engine="ideal", p50_ms=8.0),
            make_row(p50_ms=10.0),
            make_row(measurement="rate", metric="decode_tokens_per_s", engine="stock", decode_tokens_per_s=50.0),
            make_row(measurement="rate", metric="decode_tokens_per_s", decode_tokens_per_s=150.0),
        ]
    )
    assert [row.ratio for row in rows] == [None, 2.5, 2.0, None, 3.0]
    assert [row.ideal_ratio for row in rows] == [0.4, None, 0.8, None, None]
    assert (rows[2].value, rows[2].stock, rows[2].ideal, rows[2].unit) == (10.0, 20.0, 8.0, "ms/step")


@pytest.mark.parametrize("change", [{"scenario": "t"}, {"measurement": "n"}, {"model": "other"}])
def test_rows_of_another_measurement_are_not_compared(change: dict[str, str]) -> None:
    rows = with_comparisons([make_row(engine="stock", p50_ms=20.0, **change), make_row(p50_ms=10.0)])
    assert rows[1].ratio is None


def test_a_step_is_not_compared_with_one_of_another_number_of_requests() -> None:
    stock = make_row(engine="stock", p50_ms=20.0, decoding=2)
    assert with_comparisons([stock, make_row(p50_ms=10.0, decoding=1)])[1].ratio is None
    rates = {"metric": "decode_tokens_per_s", "decode_tokens_per_s": 9.0}
    rows = with_comparisons([make_row(engine="stock", decoding=1, **rates), make_row(decoding=2, **rates)])
    assert rows[1].ratio == 1.0


def test_a_refused_engine_has_no_value_and_nothing_is_compared_with_it() -> None:
    rows = with_comparisons([make_row(engine="stock", error="ValueError: no room"), make_row(p50_ms=10.0)])
    assert rows[0].value is None
    assert (rows[1].value, rows[1].ratio) == (10.0, None)
    assert "ValueError: no room" in format_tables(rows)


def test_texts_are_counted_that_are_the_same() -> None:
    rows = with_comparisons([make_row(engine="stock", texts=["a", "b", "c"]), make_row(texts=["a", "x", "c"])])
    assert [row.identical for row in rows] == [None, "2/3"]


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.json"
    assert load_rows(path) == []
    rows = [make_row(p50_ms=1.5, steps_ms=[1.0, 2.0]), make_row(engine="stock", error="no")]
    save_rows(path, rows)
    assert load_rows(path) == rows
    assert json.loads(path.read_text()) == [asdict(row) for row in rows]


@pytest.mark.parametrize("text", ["{", "[1]", '[{"scenario": "s"}]'])
def test_a_file_of_something_else_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"rows\.json does not hold"):
        load_rows(path)


def test_a_table_for_each_scenario() -> None:
    rows = with_comparisons([make_row(p50_ms=1234.5, decoding=1), make_row(scenario="t", target="fast | good")])
    text = format_tables(rows)
    assert text.count("### ") == 2
    assert "| 1,234 |" in text
    assert "| 1 of 2 |" in text
    assert "fast \\| good" in text


def test_figures_without_a_field_are_left_out() -> None:
    assert measured_fields({"p50_ms": 1.0, "block_size": 16}) == {"p50_ms": 1.0}
