"""A worker whose device is lost still gives back everything that is its own, and warms up within what it has."""

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

    def compile_or_warm_up_model(self: Any) -> None:
        blocks, passes_by = self.model_runner.kv_cache_config.num_blocks, self.flashmemory_runtime is None
        self.warmed_up = [(blocks, passes_by)]


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


@pytest.mark.parametrize(("num_blocks", "named"), [(500, 64), (40, 40)])
def test_requests_that_warm_a_model_up_name_no_block_beyond_the_slots(num_blocks: int, named: int) -> None:
    """VLLM counts them by the blocks of windows and states, of which there may be more than slots."""
    worker: Any = Worker([])
    worker.model_runner = SimpleNamespace(kv_cache_config=SimpleNamespace(num_blocks=num_blocks))
    worker._capacity = SimpleNamespace(num_slots=64)
    runtime = worker.flashmemory_runtime = SimpleNamespace(warm_up=lambda: None, last_slot_token=2047)
    worker.compile_or_warm_up_model()
    assert worker.warmed_up == [(named, True)]
    assert (worker.model_runner.kv_cache_config.num_blocks, worker.flashmemory_runtime) == (num_blocks, runtime)
