"""On a CPU work runs in order, its result is there at once, and nobody waits for it."""

import torch

from flashmemory_vllm.runtime.side_stream import SideStream


def test_a_cpu_has_one_stream() -> None:
    side_stream = SideStream(torch.device("cpu"))
    values = torch.zeros(3)
    arrival = side_stream.fetch(lambda: values + 1, values)
    values.fill_(7)
    assert side_stream.wait(arrival).tolist() == [1, 1, 1]
    assert side_stream.stall_seconds == 0
