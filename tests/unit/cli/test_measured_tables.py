"""Tables of measured rows: each shows what its file holds, and a file that it cannot read is told."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flashmemory_vllm.cli import measured_tables
from flashmemory_vllm.errors import ConfigError

COMMITTED = Path(__file__).parents[3] / "docs"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the committed rows."""
    shutil.copytree(COMMITTED / "benchmarks", tmp_path / "benchmarks")
    return tmp_path


def change(folder: Path, name: str, **fields: object) -> None:
    """Change fields of the first row of a file."""
    path = folder / "benchmarks" / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    rows[0].update(fields)
    path.write_text(json.dumps(rows))


def test_a_speed_is_that_of_its_row(folder: Path) -> None:
    change(folder, "p1", p50_ms=123.0, value=123.0, stock=123.0)
    assert "| 8x32k | stock | 123 ms/step |" in measured_tables.speed_tables(folder)


def test_an_error_stands_for_the_value_that_it_prevented(folder: Path) -> None:
    change(folder, "p1", value=None, error="out of memory")
    assert "| 8x32k | stock | out of memory |" in measured_tables.speed_tables(folder)


def test_what_was_wanted_is_told_once(folder: Path) -> None:
    # Three engines' rows of one measurement
    assert measured_tables.speed_tables(folder).count("- 8x32k: wanted between the ideal and stock") == 1


def test_a_new_file_of_rows_is_shown(folder: Path) -> None:
    rows = json.loads((folder / "benchmarks" / "p1.json").read_text())
    new = [row | {"scenario": "sweep"} for row in rows]
    (folder / "benchmarks" / "sweep.json").write_text(json.dumps(new))
    tables = measured_tables.speed_tables(folder)
    assert "### sweep (llama-8b)" in tables
    assert "[sweep.json](../benchmarks/sweep.json)" in tables


def test_texts_that_differ_are_counted(folder: Path) -> None:
    change(folder, "exactness", identical=7, texts=9, mode="eager", runner="v2", case="steady")
    assert "| llama | cuda | eager | bfloat16 | v2 | steady | 7 of 9 |" in measured_tables.exactness_table(folder)


def test_only_copies_of_many_pages_and_kernels_as_they_are_served_are_shown(folder: Path) -> None:
    tables = measured_tables.device_tables(folder)
    assert tables.count("| copy engines |") == 6
    kernels = tables.split("### Kernels")[1]
    assert "`score_blocks`" in kernels
    assert "num_warps" not in kernels


def test_a_selection_is_shown_with_what_it_costs_the_host(folder: Path) -> None:
    change(folder, "selection", measurement="one", value=1234.5, host_us=67.0, device_bytes=3 << 20, share=0.5)
    assert "| one | 1,234 | 67 | 3.0 |" in measured_tables.device_tables(folder)


def test_every_command_is_named_once(folder: Path) -> None:
    change(folder, "p1", command="flashmemory bench elsewhere")
    tables = measured_tables.speed_tables(folder)
    assert tables.count("`flashmemory bench elsewhere`") == 1


@pytest.mark.parametrize("content", ["", "{"])
def test_a_file_that_holds_no_rows_is_told(folder: Path, content: str) -> None:
    (folder / "benchmarks" / "exactness.json").write_text(content)
    with pytest.raises(ConfigError, match=r"exactness\.json cannot be read"):
        measured_tables.exactness_table(folder)


def test_a_missing_file_is_told(folder: Path) -> None:
    (folder / "benchmarks" / "kernels.json").unlink()
    with pytest.raises(ConfigError, match=r"kernels\.json cannot be read"):
        measured_tables.device_tables(folder)


def test_sparse_decode_has_a_table_of_its_own(folder: Path) -> None:
    path = folder / "benchmarks" / "exactness.json"
    rows = [row for row in json.loads(path.read_text()) if row["case"] != "sparse"]
    path.write_text(json.dumps(rows))
    assert "Sparse decode" not in measured_tables.exactness_table(folder)
    known = {name: rows[0][name] for name in ("device", "dtype", "runner", "command", "commit", "gpu", "versions")}
    counted = dict.fromkeys(("evictions", "prefetches", "streamed", "oracle_outputs"), 1234)
    sparse = {**known, **counted, "case": "sparse", "mode": "graphs", "load": "random", "layer_groups": 2, "ratio": 0.3}
    sparse |= {"identical": 47, "texts": 48, "answers_right": None, "oracle_max_error": 0.00123, "tolerance": 0.03125}
    (folder / "benchmarks" / "exactness.json").write_text(json.dumps([*rows, sparse]))
    told = measured_tables.exactness_table(folder)
    line = next(line for line in told.split("### Sparse decode")[1].splitlines() if "random" in line)
    assert "| random | 2 | 0.3 | 47 of 48 |  | 1,234 | 1,234 | 1,234 | 1,234 | 1.2e-03 | 3.1e-02 |" in line
    assert "steady" not in told.split("### Sparse decode")[1]


def test_a_soak_is_shown_when_there_is_one(folder: Path) -> None:
    assert measured_tables.soak_tables(folder) == "No run is recorded yet.\n"
