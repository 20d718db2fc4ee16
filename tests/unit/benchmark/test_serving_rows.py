"""Rows stand beside stock's of the same load and model, and survive their file."""

from pathlib import Path

import pytest

from flashmemory_vllm.benchmark.serving_rows import (
    format_serving_tables,
    load_serving_rows,
    save_serving_rows,
    with_ratios,
)
from flashmemory_vllm.errors import ConfigError
from tests.unit.benchmark.serving_twins import make_serving_row


def test_a_row_is_compared_with_stock_on_the_same_load_and_model() -> None:
    rows = [
        make_serving_row(goodput_per_s=3.0, requests_per_s=4.0),
        make_serving_row(engine="stock", goodput_per_s=1.5, requests_per_s=5.0),
        make_serving_row(engine="stock", load="other", goodput_per_s=9.0),
        make_serving_row(engine="stock", model="other", goodput_per_s=9.0),
    ]
    ours, *others = with_ratios(rows)
    assert (ours.goodput_ratio, ours.requests_ratio) == (2.0, 0.8)
    assert {row.goodput_ratio for row in others} == {None}


@pytest.mark.parametrize("stock", [0.0, None])
def test_without_goodput_of_stock_there_is_no_ratio(stock: float | None) -> None:
    ours, _ = with_ratios([make_serving_row(goodput_per_s=3.0), make_serving_row(engine="stock", goodput_per_s=stock)])
    assert ours.goodput_ratio is None


def test_rows_survive_their_file(tmp_path: Path) -> None:
    rows = [make_serving_row(error="no")]
    save_serving_rows(tmp_path / "new" / "rows.json", rows)
    assert load_serving_rows(tmp_path / "new" / "rows.json") == rows
    assert load_serving_rows(tmp_path / "missing.json") == []
    (tmp_path / "other.json").write_text('[{"scenario": "s"}]')
    with pytest.raises(ConfigError, match=r"other\.json does not hold rows of the serving benchmark"):
        load_serving_rows(tmp_path / "other.json")


def test_a_table_shows_figures_reasons_and_what_was_wanted() -> None:
    measured = make_serving_row(
        requests_per_s=1.234,
        goodput_per_s=0.0,
        **{f"{name}_p{share}_ms": 10.0 * share for name in ("ttft", "itl") for share in (50, 95, 99)},
        preemptions=1200,
        device_kv_bytes=3 << 29,
        failed=1,
        target="quick",
        ttft_limit_ms=2000.0,
    )
    text = format_serving_tables([measured, make_serving_row(engine="fp8", error="a|b", ttft_limit_ms=2000.0)])
    assert "### s (tiny, 2 GiB for KV), goodput at 50 ms a token and a first token within 2,000 ms\n" in text
    assert (
        "| l | flashmemory | 1.23 |  | 0 |  |  | 500 / 950 / 990 | 500 / 950 / 990 | 1,200 | 1.5 | 1 of 4 failed |"
        in text
    )
    assert "| l | fp8 |  |  |  |  |  |  |  |  |  | a\\|b |" in text
    assert text.endswith("\n- l: wanted quick\n")
