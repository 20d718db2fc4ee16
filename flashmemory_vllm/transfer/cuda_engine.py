"""The CUDA engine: recalls, write-backs and gathers on streams of their own, ordered by events where they meet."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from flashmemory_kernels.copy_pages import copy_pages

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.residency.types import Copies
from flashmemory_vllm.transfer.batched_copy import batched_copy, has_batched_copy
from flashmemory_vllm.transfer.checksums import PageSums
from flashmemory_vllm.transfer.engine import Ids, Marker, TransferEngine
from flashmemory_vllm.transfer.host_pool import HostPool
from flashmemory_vllm.transfer.kernel_sums import KernelSums
from flashmemory_vllm.transfer.layout import PageLayout
from flashmemory_vllm.transfer.pinned import pinned
from flashmemory_vllm.transfer.write_backs import PendingWriteBacks

# From this size on the copy engines are busy with bytes rather than with descriptors, and they need no
# multiprocessor. `python -m flashmemory_vllm.transfer.benchmark` measures both ways.
MIN_DMA_PAGE_BYTES = 32 << 10
# A copy engine serves a stream until that stream has to wait: behind a prefill chunk's write-back the few bytes of
# sampled tokens would take 17 ms to reach the host. Pieces of this size on two streams that wait for each other let
# them through in half a millisecond, and what needs a piece need not wait for all.
WRITE_BACK_BYTES = 32 << 20
# Two events with nothing to wait for between them are some microseconds apart.
LATE_SECONDS = 20e-6
# A copy kernel needs few multiprocessors, but those soon: the model's next kernel would take all of them.
HIGH_PRIORITY = -1


class CudaTransferEngine(TransferEngine):
    """Copies beside the model.

    A write-back waits for the compute stream as it stands at the call, which writes the slots that it saves; a recall
    for the last reader of the slots that it overwrites, which the caller knows. Host to device and device to host are
    different wires and different streams, so that a long write-back holds up neither a recall nor a forward pass.

    Raises:
        ConfigError: the host pool is not pinned.
    """

    def __init__(self, layout: PageLayout, pool: HostPool, compared: int | None = None) -> None:
        super().__init__(layout, pool, compared)
        if not pool.pages.is_pinned():
            raise ConfigError("the CUDA transfer engine needs a pinned host pool; got pageable memory (pin=False)")
        self._recalls, self._gathers, *self._write_backs = (
            torch.cuda.Stream(layout.device, priority=HIGH_PRIORITY)  # type: ignore[no-untyped-call]
            for _ in range(4)
        )
        self._written: Marker | None = None
        self._recalled = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # Of each wait: events before and behind it, and the number of its fence if recalls were under way.
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event, int | None]] = deque()
        self._pending = PendingWriteBacks(len(layout.groups), pool.num_blocks, layout.num_slots)
        self._group_of = {layer: group for group, layers in enumerate(layout.groups) for layer in layers}
        self._host_layers = [pool.layer_view(layer) for layer in range(layout.num_layers)]

    def upload(self, blocks: Ids) -> torch.Tensor:
        """Copy ids on the stream of the gathers, which alone reads them."""
        with torch.cuda.stream(self._gathers):
            return self._upload(blocks)

    def _page_sums(self) -> PageSums:
        return KernelSums(self.layout, self.pool.num_blocks, self._upload)

    def _fence(self, reused: Sequence[Copies]) -> None:
        """Make the compute stream wait for recalls and for who reads `reused`."""
        self._count_waits()
        markers = (self._recalled, *(self._pending.reading(use.group, use.slots) for use in reused))
        under_way = [marker for marker in markers if marker is not None and not marker.query()]
        if not under_way:
            return
        fence = self.num_fences if under_way[0] is self._recalled else None
        before = self._timed_event()
        for marker in under_way:
            self.wait(marker)
        self._waits.append((before, self._timed_event(), fence))

    def marker(self) -> Marker:
        """The compute stream so far."""
        return self._mark(torch.cuda.current_stream(self.layout.device))

    def wait(self, marker: Marker | None) -> None:
        """Make the compute stream wait."""
        if marker is not None:
            marker.wait(torch.cuda.current_stream(self.layout.device))

    def synchronize(self) -> None:
        """Block the host until all issued copies have landed."""
        for stream in (self._recalls, self._gathers, *self._write_backs):
            stream.synchronize()

    def _recall(self, group: int, blocks: Ids, slots: Ids, after: Marker | None) -> None:
        saved = (self._pending.writing(group, blocks), self._pending.reading(group, slots))
        with self._copying(self._recalls, after, *saved) as stream:
            for run in self.layout.runs(group):
                self._copy(self.pool.run_view(run), blocks, run.device_pages, slots, stream)
            self._arrives(group, blocks, slots)
        self._recalled.record(stream)

    def _write_back(self, group: int, blocks: Ids, slots: Ids) -> None:
        computed = self.marker()
        step = max(1, WRITE_BACK_BYTES // self._group_bytes(group))
        for start in range(0, len(blocks), step):
            part = slice(start, start + step)
            # The other of the two, after all pieces before: the newest piece is the last to land.
            self._write_backs.reverse()
            with self._copying(self._write_backs[0], computed, self._written) as stream:
                for run in self.layout.runs(group):
                    self._copy(run.device_pages, slots[part], self.pool.run_view(run), blocks[part], stream)
                self._written = self._mark(stream)
            self._pending.add(group, blocks[part], slots[part], self._written)

    def _gather_layer(
        self, layer: int, blocks: torch.Tensor, host_blocks: Ids, out: torch.Tensor, after: Marker | None
    ) -> Marker:
        source = self._host_layers[layer]
        written = self._pending.writing(self._group_of[layer], host_blocks)
        with self._copying(self._gathers, after, written) as stream:
            if copies_by_dma(source):
                batched_copy(source, host_blocks, out, np.arange(len(host_blocks)), stream)
            else:
                copy_pages(source, blocks, out, None)
            self._is_staged(layer, host_blocks, out)
        return self._mark(stream)

    def _copy(
        self, source: torch.Tensor, source_ids: Ids, target: torch.Tensor, target_ids: Ids, stream: torch.cuda.Stream
    ) -> None:
        if copies_by_dma(source):
            batched_copy(source, source_ids, target, target_ids, stream)
        else:
            on_device = self._upload(np.stack((source_ids, target_ids)))
            copy_pages(source, on_device[0], target, on_device[1])

    @contextmanager
    def _copying(self, stream: torch.cuda.Stream, *after: Marker | None) -> Iterator[torch.cuda.Stream]:
        for marker in after:
            if marker is not None:
                marker.wait(stream)
        with torch.cuda.stream(stream):
            yield stream

    def _upload(self, ids: Ids) -> torch.Tensor:
        """Copy ids on the current stream; their memory is reused in the order of that stream."""
        return pinned(torch.from_numpy(ids.astype(np.int64))).to(self.layout.device, non_blocking=True)

    def _forget_waits(self) -> None:
        self._waits.clear()

    def _count_waits(self) -> None:
        """Add up waits that are over: the time between two events is the device's, not the host's."""
        while self._waits and self._waits[0][1].query():  # type: ignore[no-untyped-call]
            before, after, fence = self._waits.popleft()
            seconds = before.elapsed_time(after) / 1e3
            self.counters.stall_seconds += seconds
            if fence is not None and seconds > LATE_SECONDS:
                self._was_late(fence)

    def _timed_event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.layout.device))
        return event

    @staticmethod
    def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
        return stream.record_event()  # type: ignore[no-any-return]


def copies_by_dma(pages: torch.Tensor) -> bool:
    """Whether pages uint8 [N, page_bytes] are moved by the copy engines rather than by a kernel."""
    return pages.shape[1] >= MIN_DMA_PAGE_BYTES and has_batched_copy()
