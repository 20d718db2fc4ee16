"""Which ancestors a worker holds on to, by what vLLM has made of the processes."""

import multiprocessing
import os
from collections.abc import Callable, Sequence

import psutil
import pytest

from flashmemory_vllm.plugin import lifeline


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What it would have watched, a list for each call."""
    calls: list[list[int]] = []

    def note(ancestors: Sequence[int], tell: Callable[[str], None]) -> None:
        assert callable(tell)
        calls.append(list(ancestors))

    monkeypatch.setattr(lifeline, "end_with", note)
    return calls


def test_an_engine_in_the_users_process_is_left_alone(held: list[list[int]]) -> None:
    lifeline.hold_on_to_server()
    assert held == []


@pytest.mark.parametrize("name", ["EngineCore", "EngineCore_DP1", "VllmWorker-0"])
def test_a_process_of_vllm_holds_on_to_who_started_it(
    name: str, held: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "_name", name)
    lifeline.hold_on_to_server()
    assert held == [[os.getppid()]]


def test_a_worker_of_an_engine_core_holds_on_to_the_server_too(
    held: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = os.getppid()
    monkeypatch.setattr(multiprocessing.current_process(), "_name", "VllmWorker-0")
    monkeypatch.setattr(psutil.Process, "cmdline", lambda _: ["VLLM::EngineCore_DP0"])
    lifeline.hold_on_to_server()
    assert held == [[parent, psutil.Process(parent).ppid()]]
