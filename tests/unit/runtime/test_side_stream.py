"""On a CPU work runs in order, its result is there at once, and nobody waits for it."""

import pytest
import torch

from flashmemory_vllm.runtime import side_stream as module
from flashmemory_vllm.runtime.side_stream import LandingRing, SideStream
from flashmemory_vllm.runtime.uploads import NUM_BUFFERS


def test_a_cpu_has_one_stream() -> None:
    side_stream = SideStream(torch.device("cpu"))
    values = torch.zeros(3)
    arrival = side_stream.fetch(lambda: values + 1, values)
    values.fill_(7)
    assert side_stream.wait(arrival).tolist() == [1, 1, 1]
    assert side_stream.stall_seconds == 0


def test_results_land_in_memory_of_their_own_until_so_many_more_were_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def plain(like: torch.Tensor) -> torch.Tensor:
        made.append(like.numel())
        return torch.empty(like.shape, dtype=like.dtype)

    monkeypatch.setattr(module, "pinned_like", plain)
    ring, landed = LandingRing(), list[torch.Tensor]()
    for number in range(3 * NUM_BUFFERS):
        values = torch.full((2, 3 + number % 2), number, dtype=torch.int32)
        landed.append(ring.take(values).copy_(values))
        for age, earlier in enumerate(reversed(landed[-NUM_BUFFERS:])):
            assert (earlier == number - age).all()
    assert len(made) == NUM_BUFFERS
    larger = ring.take(torch.zeros(50, dtype=torch.int32))
    assert (larger.shape, made[-1]) == ((50,), 100)
