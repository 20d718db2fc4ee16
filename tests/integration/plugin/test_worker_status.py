"""One worker tells what is where, and counts how long its steps waited for that."""

from types import SimpleNamespace
from typing import Any

from flashmemory_vllm.plugin.workers.common import ResidencyWorker
from flashmemory_vllm.runtime.status import StripsAsked


class Worker(ResidencyWorker):
    """Ours, with what the status needs."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.asked: list[StripsAsked] = []
        self.counted: list[tuple[str, float]] = []
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_index=0))
        parts: Any = SimpleNamespace(status=self._status, add=lambda *counted: self.counted.append(counted))
        self.flashmemory_runtime = self._counters = parts

    def _status(self, client_id: object, strips: StripsAsked) -> dict[str, Any]:
        assert callable(client_id)
        self.asked.append(strips)
        return {"step": 3}


def test_the_first_rank_tells_and_counts_the_time() -> None:
    worker = Worker(rank=0)
    assert worker.flashmemory_status(2, "a") == {"engine": 0, "rank": 0, "step": 3}
    assert worker.asked == [StripsAsked(2, "a")]
    ((name, seconds),) = worker.counted
    assert name == "status_seconds_total"
    assert seconds > 0


def test_other_ranks_do_nothing() -> None:
    worker = Worker(rank=1)
    assert worker.flashmemory_status(16) is None
    assert (worker.asked, worker.counted) == ([], [])
