"""A stream beside the model's, for small work whose results the host reads some steps later."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from flashmemory_vllm.runtime.uploads import NUM_BUFFERS
from flashmemory_vllm.transfer.pinned import pinned_like


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """A result on its way to the host.

    Attributes:
        values: on the host; filled once the side stream has been waited for, and until `NUM_BUFFERS` later results have
            been fetched.
        enqueued: marks what the device had to do before this work; None on a CPU, like `landed`.
        landed: marks the end of the copy.
    """

    values: torch.Tensor
    enqueued: torch.cuda.Event | None
    landed: torch.cuda.Event | None


class LandingRing:
    """Pinned memory that results land in, in turn: to allocate some for each takes the host longer than the copy."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor | None] = [None] * NUM_BUFFERS
        self._next = 0

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """Memory like `values` on the host, given again after `NUM_BUFFERS` calls. One stream fills it, in order."""
        buffer, size = self._buffers[self._next], values.numel()
        if buffer is None or buffer.numel() < size or buffer.dtype != values.dtype:
            # Twice as much as before, so that a batch that grows is done with it soon
            buffer = pinned_like(torch.empty(2 * size, dtype=values.dtype, device="meta"))
            self._buffers[self._next] = buffer
        self._next = (self._next + 1) % NUM_BUFFERS
        return buffer[:size].view(values.shape)


class SideStream:
    """Runs work after what is enqueued so far, beside what is enqueued later. On a CPU everything runs in order.

    Args:
        device: where the work runs.

    Attributes:
        stall_seconds: time in which the host waited for results and the device had nothing else to do.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._landing = LandingRing()
        self.stall_seconds = 0.0

    def fetch(self, work: Callable[[], torch.Tensor], *inputs: torch.Tensor) -> Arrival:
        """Enqueue work and the copy of its result to the host; neither is waited for.

        Args:
            work: what it allocates is reused in the order of the side stream.
            inputs: tensors of the current stream that it reads, and that nobody overwrites meanwhile.
        """
        if self._stream is None:
            return Arrival(work(), None, None)
        enqueued = torch.cuda.current_stream(self._device).record_event()
        self._stream.wait_event(enqueued)
        for tensor in inputs:
            # Not to be given out again on the current stream before the work has read it
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            values = work()
            on_host = self._landing.take(values)
            on_host.copy_(values, non_blocking=True)
            landed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            landed.record()
        return Arrival(on_host, enqueued, landed)

    def run(self, work: Callable[[], None]) -> None:
        """Enqueue work that nobody waits for, after all that is enqueued here."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            work()

    def wait(self, arrival: Arrival) -> torch.Tensor:
        """The values on the host; counts how long the device was done with all before them and waited too."""
        if arrival.enqueued is not None and arrival.landed is not None:
            arrival.enqueued.synchronize()
            started = time.perf_counter()
            arrival.landed.synchronize()
            self.stall_seconds += time.perf_counter() - started
        return arrival.values
