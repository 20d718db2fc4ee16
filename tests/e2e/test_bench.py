"""`flashmemory bench` with the smoke scenario: vLLM's own engine and ours, in real processes, side by side."""

import subprocess
import sys
from pathlib import Path

import pytest

from flashmemory_vllm.benchmark.rows import BenchRow, load_rows

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "bench" / "smoke.yaml"
TIMEOUT_SECONDS = 1800


@pytest.fixture(scope="module")
def rows(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], BenchRow]:
    """Rows of one run by measurement and engine."""
    path = tmp_path_factory.mktemp("bench") / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "flashmemory_vllm.cli.app", "bench", str(SMOKE), "--out", str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_SECONDS,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "### smoke" in done.stdout
    return {(row.measurement, row.engine): row for row in load_rows(path)}


def test_every_engine_that_starts_is_timed(rows: dict[tuple[str, str], BenchRow]) -> None:
    measured = {key for key, row in rows.items() if row.error is None}
    assert measured == {
        ("sparse", "stock"),
        ("sparse", "ideal"),
        ("sparse", "flashmemory"),
        ("dense", "stock"),
        ("dense", "flashmemory"),
    }
    for key in measured:
        row = rows[key]
        assert row.decoding == row.batch
        assert row.value is not None
        assert row.value > 0
        assert row.prefill_tokens_per_s is not None
        assert row.device_kv_bytes is not None


def test_an_engine_that_refuses_to_start_is_a_row_with_its_reason(rows: dict[tuple[str, str], BenchRow]) -> None:
    error = rows["refused", "stock"].error
    assert error is not None
    assert "max seq len (4096)" in error


def test_our_engine_selected_and_wrote_back(rows: dict[tuple[str, str], BenchRow]) -> None:
    ours, stock = rows["sparse", "flashmemory"], rows["sparse", "stock"]
    assert ours.selections is not None
    # Once each when prefill ends, and again after tau = 16 steps
    assert ours.selections >= 4
    assert ours.bytes_d2h is not None
    assert ours.bytes_d2h > 0
    assert ours.selecting_steps
    assert (stock.selections, stock.bytes_d2h) == (None, None)


def test_dense_texts_are_the_same(rows: dict[tuple[str, str], BenchRow]) -> None:
    assert rows["dense", "flashmemory"].identical == "3/3"
