"""Every load of every server gets a row or stays for a later run, whichever of the two fails."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flashmemory_vllm.benchmark.serving_client import figures_of
from flashmemory_vllm.benchmark.serving_rows import ServingRow, load_serving_rows
from flashmemory_vllm.benchmark.serving_run import PREEMPTIONS, ServingRun
from flashmemory_vllm.benchmark.serving_scenario import ServingCell, make_serving_cells
from flashmemory_vllm.errors import ConfigError, FlashMemoryError
from flashmemory_vllm.evaluation.provenance import Provenance
from tests.unit.benchmark.serving_twins import LOAD, MODEL, make_result, make_scenario

PROVENANCE = Provenance("flashmemory bench", "abc", "GPU", {})


class ServerTwin:
    """Preempts 3 requests a load; breaks at the loads `breaks` and `half`, and does not start as `fp8`."""

    url = "here"

    def __init__(self, cell: ServingCell, started: list[str]) -> None:
        self._cell = cell
        self._is_broken = self._is_silent = False
        self._preempted = 10.0
        self.warm: list[int] = []
        started.append(cell.engine)

    def __enter__(self) -> "ServerTwin":
        if self._cell.engine == "fp8":
            raise FlashMemoryError("ValueError: no fp8\nmore of it")
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def read_metrics(self) -> dict[str, float]:
        if self._is_silent:
            raise ConnectionRefusedError
        return {PREEMPTIONS: self._preempted}

    def read_kv_bytes(self) -> int:
        return 77

    def complete(self, prompt_ids: list[int], max_tokens: int) -> str:
        assert max_tokens == LOAD["output_tokens"]
        self.warm.append(len(prompt_ids))
        return ""

    def end_reason(self) -> str | None:
        return "RuntimeError: out of memory" if self._is_broken else None

    def load(self, name: str) -> dict[str, Any]:
        assert self.warm.count(100) == 2
        self.warm.clear()
        self._preempted += 3
        self._is_broken = name in {"breaks", "half"}
        self._is_silent = name == "breaks"
        if name == "refused":
            raise FlashMemoryError("ValueError: no such dataset")
        return figures_of(make_result(failed=1 if name in {"half", "some"} else 0))


def run(path: Path, cells: Sequence[ServingCell], started: list[str], **options: Any) -> list[ServingRow]:
    servers: list[ServerTwin] = []

    def start(cell: ServingCell) -> ServerTwin:
        servers.append(ServerTwin(cell, started))
        return servers[-1]

    rows = ServingRun(
        "tiny", path, PROVENANCE, start, lambda cell, _url: servers[-1].load(cell.load.name), **options
    ).run(cells)
    assert rows == load_serving_rows(path)
    return rows


def make_cells(names: Sequence[str], engines: Any) -> list[ServingCell]:
    return make_serving_cells(make_scenario(loads=[LOAD | {"name": name} for name in names]), engines, MODEL)


def test_one_server_measures_all_loads_and_counts_its_preemptions(tmp_path: Path) -> None:
    started: list[str] = []
    rows = run(tmp_path / "rows.json", make_cells("ab", ["stock", "flashmemory"]), started)
    assert started == ["stock", "flashmemory"]
    assert [(row.engine, row.load, row.error) for row in rows] == [
        *(("stock", "a", None), ("stock", "b", None)),
        *(("flashmemory", "a", None), ("flashmemory", "b", None)),
    ]
    assert {(row.preemptions, row.device_kv_bytes, row.kv_memory_bytes) for row in rows} == {(3, 77, 2 << 30)}
    assert [row.goodput_ratio for row in rows] == [None, None, 1.0, 1.0]


def test_a_server_that_does_not_start_is_not_tried_again(tmp_path: Path) -> None:
    started: list[str] = []
    rows = run(tmp_path / "rows.json", make_cells("ab", ["fp8", "stock"]), started)
    assert started == ["fp8", "stock"]
    assert [row.error for row in rows] == ["ValueError: no fp8", "ValueError: no fp8", None, None]


@pytest.mark.parametrize(
    ("load", "said"),
    [
        ("breaks", "RuntimeError: out of memory"),
        ("half", "RuntimeError: out of memory"),
        ("refused", "ValueError: no such dataset"),
    ],
)
def test_after_a_load_that_failed_the_others_get_a_server_of_their_own(load: str, said: str, tmp_path: Path) -> None:
    started: list[str] = []
    rows = run(tmp_path / "rows.json", make_cells(["a", load, "b"], ["stock"]), started)
    assert started == ["stock", "stock"]
    assert [row.error for row in rows] == [None, said, None]


def test_a_request_that_failed_alone_is_counted(tmp_path: Path) -> None:
    (row,) = run(tmp_path / "rows.json", make_cells(["some"], ["stock"]), [])
    assert (row.error, row.failed) == (None, 1)


def test_what_has_a_row_is_not_measured_again(tmp_path: Path) -> None:
    started: list[str] = []
    run(tmp_path / "rows.json", make_cells("a", ["stock"]), started)
    with pytest.raises(ConfigError, match="it exists"):
        run(tmp_path / "rows.json", make_cells("ab", ["stock"]), started)
    rows = run(tmp_path / "rows.json", make_cells("ab", ["stock"]), started, resume=True)
    assert [row.load for row in rows] == ["a", "b"]


def test_after_the_time_limit_no_load_begins(tmp_path: Path) -> None:
    started: list[str] = []
    assert run(tmp_path / "rows.json", make_cells("ab", ["stock"]), started, time_limit=-1.0) == []
    assert started == []
