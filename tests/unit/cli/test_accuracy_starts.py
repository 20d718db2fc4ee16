"""The process behind `flashmemory accuracy` gets its whole job, and its errors arrive whatever their size."""

from dataclasses import replace
from pathlib import Path

import pytest

from flashmemory_vllm.cli import accuracy_starts
from flashmemory_vllm.cli.accuracy_starts import Job, Start, measure
from flashmemory_vllm.errors import ConfigError, FlashMemoryError, IntegrityError
from flashmemory_vllm.evaluation.accuracy import Cell, Conditions
from flashmemory_vllm.evaluation.accuracy_rows import Setting

# No pipe holds as much
LONG = 1 << 20


@pytest.fixture(autouse=True)
def _twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy_starts, "WORKER_MODULE", "tests.unit.cli.accuracy_twin")
    monkeypatch.chdir(Path(__file__).parents[3])
    monkeypatch.setenv("PYTHONPATH", ".:kernels")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    setting = Setting("neural", 16, 0.135, 2, (1, 3), "indexer.safetensors", score_threshold=0.25)
    start = Start(
        [Cell(setting, "multikey", 4096, 200, 8)], {"max_model_len": 4246, "dtype": "auto"}, {"tau_steps": 16}
    )
    conditions = Conditions("reference", 32, block_bytes=98304)
    return Job(tmp_path / "model", start, conditions, [tmp_path / "data"], tmp_path / "rows", ["run"], None, 12.5)


def test_a_job_is_read_as_it_was_written(job: Job, tmp_path: Path) -> None:
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job
    measure(job)
    assert job.path.read_text() == repr(job)


def test_an_error_longer_than_a_pipe_holds_arrives(job: Job) -> None:
    with pytest.raises(ConfigError) as refused:
        measure(replace(job, command=["refuse", str(LONG)]))
    assert str(refused.value) == "x" * LONG


def test_an_error_keeps_its_kind(job: Job) -> None:
    with pytest.raises(IntegrityError, match="used 3, free 4"):
        measure(replace(job, command=["break"]))


def test_a_process_that_ends_without_a_word_is_told(job: Job) -> None:
    with pytest.raises(FlashMemoryError, match="ended with 7; its log is above"):
        measure(replace(job, command=["die", "7"]))
