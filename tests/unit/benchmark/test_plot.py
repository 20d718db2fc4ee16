"""Pictures show what the rows say: where stock is faster, and where either engine has no figure."""

from pathlib import Path

import numpy as np
import pytest

from flashmemory_vllm.benchmark.plot import is_grid, plot_rows, speedups
from flashmemory_vllm.benchmark.rows import BenchRow, with_comparisons
from flashmemory_vllm.errors import ConfigError
from tests.unit.benchmark.twins import make_row


def make_pair(context: int, batch: int, stock_ms: float | None, ours_ms: float | None) -> list[BenchRow]:
    common = {"measurement": f"{batch}x{context}", "batch": batch, "prompt_tokens": batch * context}
    return [
        make_row(**common, engine=engine, p50_ms=ms, decoding=batch, error=None if ms else "skipped: needs more")
        for engine, ms in (("stock", stock_ms), ("flashmemory", ours_ms))
    ]


GRID = with_comparisons(
    [
        *make_pair(8192, 1, 8.0, 10.0),
        *make_pair(8192, 2, 8.0, 8.0),
        *make_pair(32768, 1, 30.0, 10.0),
        *make_pair(32768, 2, None, 12.0),
    ]
)
BARS = with_comparisons([make_row(engine=engine, p50_ms=5.0) for engine in ("stock", "ideal", "flashmemory")])


def test_a_grid_holds_speedups_and_gaps() -> None:
    contexts, batches, grid = speedups(GRID)
    assert (contexts, batches) == ([8192, 32768], [1, 2])
    np.testing.assert_allclose(grid, [[0.8, 3.0], [1.0, np.nan]])


def test_a_batch_that_did_not_decode_at_once_is_a_gap() -> None:
    stock, ours = make_pair(8192, 4, 8.0, 4.0)
    for pair in ([make_row(**fields(stock, decoding=3)), ours], [stock, make_row(**fields(ours, decoding=3))]):
        assert np.isnan(speedups(with_comparisons(pair))[2]).all()


def fields(row: BenchRow, **changes: int) -> dict[str, object]:
    return {name: getattr(row, name) for name in row.__slots__} | changes


def test_only_a_grid_is_drawn_as_a_map() -> None:
    assert is_grid(GRID)
    assert not is_grid(BARS)


@pytest.mark.parametrize("rows", [GRID, BARS, [*GRID, *BARS]], ids=["map", "bars", "both"])
def test_a_picture_is_written(rows: list[BenchRow], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "picture.png"
    plot_rows(rows, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_losing_region_is_hatched(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.svg"
    plot_rows(GRID, path)
    losing = path.read_text().count("<pattern")
    plot_rows([row for row in GRID if row.measurement != "1x8192"] + make_pair(8192, 1, 12.0, 10.0), path)
    assert (losing, path.read_text().count("<pattern")) == (1, 0)


def test_rows_without_a_value_make_no_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="no row has a value"):
        plot_rows([make_row(error="no")], tmp_path / "picture.png")
