"""An engine's process is followed to its end, its error is found in the log, and nothing of it stays."""

import subprocess
import sys
from pathlib import Path

import pytest

from flashmemory_vllm.benchmark import process
from flashmemory_vllm.benchmark.cells import EngineSetup
from flashmemory_vllm.benchmark.process import EngineProcess, Job
from tests.unit.benchmark.twins import make_work
from tests.unit.processes.test_guarded import is_running


@pytest.fixture(autouse=True)
def _twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "WORKER_MODULE", "tests.unit.benchmark.worker_twin")
    monkeypatch.chdir(Path(__file__).parents[3])
    monkeypatch.setenv("PYTHONPATH", ".:kernels")


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    works = [make_work(), make_work(prompt_lens=(5, 7), must_fit=True)]
    job = Job(EngineSetup({"model": "m", "seed": 1}, {"tau_steps": 4}), works, 12.5)
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job


def test_events_arrive_in_order_and_the_log_is_kept(tmp_path: Path) -> None:
    job = Job(EngineSetup({}, None), [make_work(prompt_lens=(3,)), make_work(prompt_lens=(4,))])
    with EngineProcess(job, tmp_path / "log") as running:
        events = list(running.follow())
        assert running.error() is None
    assert [(event.kind, event.place) for event in events] == [
        ("begin", 0),
        ("figures", 0),
        ("begin", 1),
        ("figures", 1),
    ]
    assert events[3].figures == {"p50_ms": 4.0}
    assert "it prints here too" in (tmp_path / "log").read_text()


def test_an_engine_that_refuses_says_why() -> None:
    with EngineProcess(Job(EngineSetup({"refuse": "no room\nfor this"}, None), [make_work()])) as running:
        assert list(running.follow()) == []
        assert running.error() == "ValueError: no room"


def test_children_that_outlive_the_process_are_ended(tmp_path: Path) -> None:
    with EngineProcess(Job(EngineSetup({"linger": str(tmp_path / "pid")}, None), [])) as running:
        assert list(running.follow()) == []
        assert running.error() is None
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_an_engine_that_fails_and_hangs_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM's front end waits for its engine core without a limit; a core that failed may hang on its way out."""
    monkeypatch.setattr(process, "ENDING_SECONDS", 0.2)
    refused = "flashmemory.host_memory_gib: 72.0 given, allowed: at most 49.71"
    with EngineProcess(Job(EngineSetup({"refuse_and_hang": refused}, None), [make_work()])) as running:
        assert list(running.follow()) == []
        assert running.error() == f"flashmemory_vllm.errors.ConfigError: {refused}"


def test_an_engine_that_does_not_start_is_given_up() -> None:
    job = Job(EngineSetup({"hang": "after a warning"}, None), [make_work()])
    with EngineProcess(job, startup_seconds=0.5) as running:
        assert list(running.follow()) == []
        assert running.error() == "the engine was not up after 0.5 s"


def test_an_engine_that_hangs_once_it_is_done_has_done_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "ENDING_SECONDS", 0.2)
    job = Job(EngineSetup({"hang_at_exit": True}, None), [make_work(prompt_lens=(3,))])
    with EngineProcess(job) as running:
        assert [event.kind for event in running.follow()] == ["begin", "figures"]
        assert running.error() is None


def test_why_a_worker_ends_is_told_where_torch_prints_what_python_would() -> None:
    script = """
import contextlib, io, sys
from flashmemory_vllm.cli.bench_worker import leave
def as_torch_does(*failed):
    with contextlib.redirect_stderr(io.StringIO()):
        leave(*failed)
sys.excepthook = as_torch_does
raise ValueError("why")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: why\n")
