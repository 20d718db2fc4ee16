"""CUDA streams and events without a device: work is queued, and runs in any order that the events allow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import torch
from flashmemory_kernels.checksum_pages import store_checksums, verify_checksums
from flashmemory_kernels.copy_pages import copy_pages

from flashmemory_vllm.transfer import cuda_engine, kernel_sums


@dataclass(eq=False)
class Record:
    """One place in a stream; reached when the device had done so much work."""

    reached_at: int | None = None

    @property
    def is_reached(self) -> bool:
        return self.reached_at is not None


class Event:
    """As `torch.cuda.Event`: a wait is for the record that was last made when it is called."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._last: Record | None = None

    def record(self, stream: Stream) -> None:
        self._last = Record()
        stream.queue.append(self._last)

    def wait(self, stream: Stream) -> None:
        if self._last is not None:
            stream.queue.append((self._last,))

    def query(self) -> bool:
        self._device.run_some()
        return self._last is None or self._last.is_reached

    def synchronize(self) -> None:
        while self._last is not None and not self._last.is_reached:
            self._device.run_one()

    def elapsed_time(self, end: Event) -> float:
        assert self._last is not None
        assert self._last.reached_at is not None
        assert end._last is not None
        assert end._last.reached_at is not None
        return float(end._last.reached_at - self._last.reached_at)


class Stream:
    """A queue of work, of records, and of records to wait for (in a tuple)."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.queue: deque[Callable[[], object] | Record | tuple[Record]] = deque()

    def record_event(self) -> Event:
        event = Event(self._device)
        event.record(self)
        return event

    def synchronize(self) -> None:
        while self.queue:
            self._device.run_one()

    @property
    def is_ready(self) -> bool:
        head = self.queue[0] if self.queue else None
        return head is not None and (not isinstance(head, tuple) or head[0].is_reached)

    def advance(self) -> None:
        head = self.queue.popleft()
        if isinstance(head, Record):
            head.reached_at = self._device.work_done
        elif not isinstance(head, tuple):
            self._device.work_done += 1
            head()


class Device:
    """Streams that advance in a random order whenever the host asks for something."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self.streams: list[Stream] = []
        self.work_done = 0
        self.current = self.make_stream()

    def make_stream(self, *_: Any, **__: Any) -> Stream:
        self.streams.append(Stream(self))
        return self.streams[-1]

    def enqueue(self, work: Callable[[], object]) -> None:
        self.current.queue.append(work)
        self.run_some()

    def run_one(self) -> None:
        ready = [stream for stream in self.streams if stream.is_ready]
        assert ready, "streams wait for each other"
        self._random.choice(ready).advance()

    def run_some(self) -> None:
        for _ in range(self._random.choice((0, 0, 1, 5, 50))):
            if any(stream.is_ready for stream in self.streams):
                self.run_one()

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


@contextmanager
def simulated(random: Random, *, by_dma: bool) -> Iterator[Device]:
    """Let `CudaTransferEngine` run on the CPU, its copies queued on simulated streams."""
    device = Device(random)

    def batched(source: torch.Tensor, source_ids: Any, target: torch.Tensor, target_ids: Any, stream: Stream) -> None:
        ids = torch.from_numpy(source_ids.astype("int64")), torch.from_numpy(target_ids.astype("int64"))
        with device.on(stream):
            device.enqueue(lambda: copy_pages(source, ids[0], target, ids[1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", device.make_stream)
        patch.setattr(torch.cuda, "Event", lambda **_: Event(device))
        patch.setattr(torch.cuda, "stream", device.on)
        patch.setattr(torch.cuda, "current_stream", lambda _: device.current)
        patch.setattr(torch.Tensor, "is_pinned", lambda _: True)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        patch.setattr(cuda_engine, "copies_by_dma", lambda _: by_dma)
        patch.setattr(cuda_engine, "batched_copy", batched)
        patch.setattr(cuda_engine, "copy_pages", lambda *given: device.enqueue(lambda: copy_pages(*given)))
        for name, kernel in (("store_checksums", store_checksums), ("verify_checksums", verify_checksums)):
            patch.setattr(kernel_sums, name, _launch(device, kernel))
        yield device


def _launch(device: Device, kernel: Callable[..., object]) -> Callable[..., None]:
    return lambda *given: device.enqueue(lambda: kernel(*given))
