"""Every cell gets a row or stays for a later run, whichever way engines fail."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from flashmemory_vllm.benchmark.cells import Cell, EngineSetup
from flashmemory_vllm.benchmark.process import EngineProcess, Event, Job
from flashmemory_vllm.benchmark.rows import load_rows
from flashmemory_vllm.benchmark.run import BenchRun
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.provenance import Provenance
from tests.unit.benchmark.twins import make_work

PROVENANCE = Provenance("flashmemory bench", "abc", "GPU", {})


class ProcessTwin(EngineProcess):
    """Measures without a process; breaks at the load whose prompt is as long as the setup says."""

    jobs: list[Job]

    def __init__(self, job: Job) -> None:
        self._job = job
        self._has_failed = False
        ProcessTwin.jobs.append(job)

    def __enter__(self) -> "ProcessTwin":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def follow(self) -> Iterator[Event]:
        llm = self._job.setup.llm
        self._has_failed = "refuse" in llm
        for place, work in enumerate([] if self._has_failed else self._job.works):
            yield Event("begin", place, {})
            if llm.get("break_at") == sum(work.prompt_lens):
                self._has_failed = True
                return
            yield Event("figures", place, {"p50_ms": 5.0, "decoding": 1})

    def error(self) -> str | None:
        return "ValueError: no" if self._has_failed else None


@pytest.fixture(autouse=True)
def jobs() -> list[Job]:
    ProcessTwin.jobs = []
    return ProcessTwin.jobs


def make_cells(lens: Sequence[int], **llm: Any) -> list[Cell]:
    setup = EngineSetup(llm, None)
    works = [make_work(prompt_lens=(length,)) for length in lens]
    return [
        Cell("s", str(length), "stock", "step_ms", None, setup, work) for length, work in zip(lens, works, strict=True)
    ]


def run(path: Path, cells: Sequence[Cell], **changes: Any) -> dict[str, str | None]:
    rows = BenchRun("tiny", path, PROVENANCE, start=ProcessTwin, **changes).run(cells)
    assert rows == load_rows(path)
    return {row.measurement: row.error for row in rows}


def test_one_process_measures_all_that_share_a_setup(tmp_path: Path, jobs: list[Job]) -> None:
    cells = [*make_cells([1, 2]), *make_cells([3], seed=1), *make_cells([4])]
    assert run(tmp_path / "rows.json", cells) == dict.fromkeys("1243")
    assert [len(job.works) for job in jobs] == [3, 1]


def test_an_engine_that_does_not_start_is_not_tried_again(tmp_path: Path, jobs: list[Job]) -> None:
    cells = [*make_cells([1, 2], refuse=True), *make_cells([3])]
    assert run(tmp_path / "rows.json", cells) == {"1": "ValueError: no", "2": "ValueError: no", "3": None}
    assert len(jobs) == 2


def test_a_load_that_breaks_its_engine_costs_only_its_own_row(tmp_path: Path, jobs: list[Job]) -> None:
    assert run(tmp_path / "rows.json", make_cells([1, 2, 3], break_at=2)) == {
        "1": None,
        "2": "ValueError: no",
        "3": None,
    }
    assert len(jobs) == 2


def test_resuming_measures_what_is_missing(tmp_path: Path, jobs: list[Job]) -> None:
    path = tmp_path / "rows.json"
    run(path, make_cells([1]))
    run(path, make_cells([1, 2]), resume=True)
    assert [len(job.works) for job in jobs] == [1, 1]
    assert [row.measurement for row in load_rows(path)] == ["1", "2"]
    with pytest.raises(ConfigError, match="--resume"):
        run(path, make_cells([3]))


def test_no_process_starts_after_the_time_limit(
    tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = BenchRun("tiny", tmp_path / "rows.json", PROVENANCE, time_limit=60.0, start=ProcessTwin)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    assert bench.run(make_cells([1])) == []
    assert jobs == []
