"""A worker whose device is lost still gives back everything that is its own."""

from types import SimpleNamespace
from typing import Any

import pytest

from flashmemory_vllm.plugin.workers.common import ResidencyWorker


class Base:
    """Stands for vLLM's worker."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def shutdown(self) -> None:
        self.calls.append("vLLM's own shutdown")


class Worker(ResidencyWorker, Base):
    """Ours, around a runtime and counters that fail."""

    def __init__(self, calls: list[str]) -> None:
        # As far as a worker comes whose options cannot be read
        Base.__init__(self, calls)


def fail(calls: list[str], name: str) -> Any:
    def call() -> None:
        calls.append(name)
        raise RuntimeError(f"{name}: CUDA error")

    return call


def test_everything_is_given_back_whatever_fails() -> None:
    calls: list[str] = []
    worker: Any = Worker(calls)
    worker.flashmemory_runtime = SimpleNamespace(release=fail(calls, "release"))
    worker._counters = SimpleNamespace(close=fail(calls, "close"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        worker.shutdown()
    assert calls == ["release", "close", "vLLM's own shutdown"]
    assert worker.flashmemory_runtime is None


def test_a_worker_that_was_never_ready_can_be_shut_down() -> None:
    calls: list[str] = []
    Worker(calls).shutdown()
    assert calls == ["vLLM's own shutdown"]
