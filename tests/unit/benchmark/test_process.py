"""An engine's process is followed to its end, its error is found in the log, and nothing of it stays."""

from pathlib import Path

import pytest

from flashmemory_vllm.benchmark import process
from flashmemory_vllm.benchmark.cells import EngineSetup
from flashmemory_vllm.benchmark.process import EngineProcess, Job, find_error
from tests.unit.benchmark.twins import make_work


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
        list(running.follow())
        stat = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
        assert stat.exists()
    assert not stat.exists() or ") Z " in stat.read_text()


ECHOED = """\
(EngineCore pid=7) ERROR 11-24 02:32:48 [core.py:1510] ValueError: too long
ValueError: too long
RuntimeError: Engine core initialization failed. See root cause above.
"""
WARNED = "(MainProcess pid=7) WARNING 11-24 [base.py:380] ValueError: Tokenizer not available"
INVALID = """\
core.ValidationError: 1 validation error for VllmConfig
  Value error, flashmemory.tau is no option [type=value_error, input_value=Args
    For further information
"""
INVALID_CAUSE = "core.ValidationError: 1 validation error for VllmConfig: Value error, flashmemory.tau is no option"


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("all is well\nINFO no Error: here", None),
        (ECHOED, "ValueError: too long"),
        (WARNED, None),
        (f"{ECHOED}{WARNED}", "ValueError: too long"),
        (INVALID, INVALID_CAUSE),
        ("torch.OutOfMemoryError: CUDA out of memory.", "torch.OutOfMemoryError: CUDA out of memory."),
    ],
)
def test_the_cause_is_found_among_echoes_and_warnings(log: str, error: str | None) -> None:
    assert find_error(log) == error
