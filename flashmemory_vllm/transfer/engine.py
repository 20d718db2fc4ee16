"""Moves pages between the host pool and the device slots: the contract, and the synchronous CPU engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields

import numpy as np
import torch
from flashmemory_kernels.copy_pages import copy_pages

from flashmemory_vllm.residency.types import Copies
from flashmemory_vllm.transfer.checksums import Comparison, CrcSums, PageChecks, PageSums
from flashmemory_vllm.transfer.host_pool import HostPool
from flashmemory_vllm.transfer.layout import PageLayout
from flashmemory_vllm.transfer.markers import Ids, Marker

__all__ = ["CpuTransferEngine", "Ids", "Marker", "TransferCounters", "TransferEngine"]


@dataclass(slots=True)
class TransferCounters:
    """Totals since start; the worker reports them.

    Attributes:
        bytes_h2d: host to slots, recalls and prefetches.
        bytes_streamed: host to staging buffers, gathers.
        bytes_d2h: device to host, write-backs.
        late_fences: fences at which the device had come to the end of its work before a recall had landed.
        stall_seconds: time that the device spent waiting at fences, with nothing else to do.
        compared_pages: pages, of one layer each, that came from the host and were compared with their checksums.
        wrong_pages: those of them that were others than had been saved. Counted by whoever reads the comparisons.
    """

    bytes_h2d: int = 0
    bytes_streamed: int = 0
    bytes_d2h: int = 0
    late_fences: int = 0
    stall_seconds: float = 0.0
    compared_pages: int = 0
    wrong_pages: int = 0


class TransferEngine(ABC):
    """Executes the copies of a step plan.

    Order seen by the caller: a write-back runs after all device work enqueued before the call, a recall and a
    gather only after the marker they are given. A recall, and a gather, of a block that is being written back
    reads what is written. Device work enqueued after `fence` runs after all recalls issued before it. So a recall
    into slots that nobody uses any more runs beside the forward passes enqueued before, and the next one reads it.

    Nothing waits for a write-back but who needs it: a recall into a slot that it reads, and work that `fence`
    was told writes to such a slot.

    Args:
        layout: where pages lie.
        pool: the host tier.
        compared: one of so many pages that come from the host is compared with its checksum. Default: None, pages
            have no checksums.
    """

    def __init__(self, layout: PageLayout, pool: HostPool, compared: int | None = None) -> None:
        self.layout = layout
        self.pool = pool
        self.counters = TransferCounters()
        self._checks = None if compared is None else PageChecks(self._page_sums(), compared)
        self._num_fences = 0
        self._late_fences: list[int] = []

    def recall(self, group: int, blocks: Ids, slots: Ids, after: Marker | None) -> None:
        """Copy host blocks `blocks[i]` into device slots `slots[i]`, all layers of the group.

        Args:
            group: layer group.
            blocks: [n] host blocks.
            slots: [n] device slots.
            after: the last use of what the slots hold. None if nothing enqueued so far uses it.
        """
        if len(blocks):
            self._recall(group, blocks, slots, after)
            self.counters.bytes_h2d += len(blocks) * self._group_bytes(group)

    def write_back(self, group: int, blocks: Ids, slots: Ids) -> None:
        """Copy device slots `slots[i]` into host blocks `blocks[i]`, all layers of the group."""
        if len(blocks):
            if self._checks is not None:
                self._checks.leaves(group, blocks, slots)
            self._write_back(group, blocks, slots)
            self.counters.bytes_d2h += len(blocks) * self._group_bytes(group)

    def gather_layer(
        self, layer: int, blocks: torch.Tensor, host_blocks: Ids, out: torch.Tensor, after: Marker | None
    ) -> Marker | None:
        """Copy a layer's pages of host blocks to the first rows of `out`.

        Args:
            layer: attention layer.
            blocks: int64 [n], the blocks, from `upload`.
            host_blocks: [n], the same blocks on the host.
            out: uint8 [n or more, page_bytes] on the device.
            after: the last use of what `out` holds. None if it was not used.

        Returns:
            What to `wait` for before `out` is read. None if there is nothing to wait for.
        """
        self.counters.bytes_streamed += len(host_blocks) * self.layout.layer_bytes(layer)
        return self._gather_layer(layer, blocks, host_blocks, out, after)

    @abstractmethod
    def upload(self, blocks: Ids) -> torch.Tensor:
        """Put ids [n] where `gather_layer` reads them; int64 [n]."""

    def fence(self, reused: Sequence[Copies]) -> None:
        """Make device work enqueued from now on wait for all issued recalls; never blocks the host.

        Args:
            reused: slots that this work writes to although write-backs may still read them. It then waits for
                those write-backs too.
        """
        self._num_fences += 1
        if self._checks is not None:
            self._checks.fence()
        self._fence(reused)

    @property
    def num_fences(self) -> int:
        """Calls of `fence` so far: the number of the last one."""
        return self._num_fences

    def take_late_fences(self) -> list[int]:
        """Numbers of the fences that are known since the last call to have waited for a recall."""
        taken, self._late_fences = self._late_fences, []
        return taken

    def take_comparisons(self) -> tuple[Comparison, ...]:
        """The comparisons of pages that the work enqueued so far reads, and no work before the last call did."""
        taken = () if self._checks is None else self._checks.take()
        self.counters.compared_pages += sum(comparison.wrong.numel() for comparison in taken)
        return taken

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Run every kernel there is inside; what was enqueued is done at the end, and was no traffic to be counted."""
        before = {field.name: getattr(self.counters, field.name) for field in fields(self.counters)}
        with nullcontext() if self._checks is None else self._checks.warming_up():
            yield
            self.synchronize()
        self._forget_waits()
        self._late_fences = []
        for name, total in before.items():
            setattr(self.counters, name, total)

    @abstractmethod
    def marker(self) -> Marker | None:
        """The device work enqueued so far. None if there is nothing to wait for."""

    @abstractmethod
    def wait(self, marker: Marker | None) -> None:
        """Make device work enqueued from now on wait for a marker; never blocks the host."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block the host until all issued copies have landed (sleep, shutdown, tests)."""

    @abstractmethod
    def _forget_waits(self) -> None:
        """Drop what would be added to the counters later."""

    @abstractmethod
    def _page_sums(self) -> PageSums: ...

    @abstractmethod
    def _fence(self, reused: Sequence[Copies]) -> None: ...

    @abstractmethod
    def _recall(self, group: int, blocks: Ids, slots: Ids, after: Marker | None) -> None: ...

    @abstractmethod
    def _write_back(self, group: int, blocks: Ids, slots: Ids) -> None: ...

    @abstractmethod
    def _gather_layer(
        self, layer: int, blocks: torch.Tensor, host_blocks: Ids, out: torch.Tensor, after: Marker | None
    ) -> Marker | None: ...

    def _was_late(self, fence: int) -> None:
        """The fence of this number has waited for a recall."""
        self.counters.late_fences += 1
        self._late_fences.append(fence)

    def _arrives(self, group: int, blocks: Ids, slots: Ids) -> None:
        """The copies into these slots are enqueued, on the current stream."""
        if self._checks is not None:
            self._checks.arrives(group, blocks, slots, self.marker)

    def _is_staged(self, layer: int, blocks: Ids, staged: torch.Tensor) -> None:
        """The copies into this buffer are enqueued, on the current stream."""
        if self._checks is not None:
            self._checks.is_staged(layer, blocks, staged, self.marker)

    def _group_bytes(self, group: int) -> int:
        return sum(self.layout.layer_bytes(layer) for layer in self.layout.groups[group])


class CpuTransferEngine(TransferEngine):
    """Copies at once on the calling thread; nothing to wait for."""

    def upload(self, blocks: Ids) -> torch.Tensor:
        """The ids as a tensor."""
        return torch.from_numpy(blocks.astype(np.int64))

    def marker(self) -> Marker | None:
        """All is done."""

    def wait(self, marker: Marker | None) -> None:
        """Nothing is in flight."""

    def synchronize(self) -> None:
        """Nothing is in flight."""

    def _page_sums(self) -> PageSums:
        return CrcSums(self.layout, self.pool.num_blocks)

    def _fence(self, reused: Sequence[Copies]) -> None:
        """Nothing is in flight."""

    def _forget_waits(self) -> None:
        """Nothing is in flight."""

    def _recall(
        self,
        group: int,
        blocks: Ids,
        slots: Ids,
        after: Marker | None,  # noqa: ARG002 - all earlier use is over
    ) -> None:
        source, target = self.upload(blocks), self.upload(slots)
        for run in self.layout.runs(group):
            copy_pages(self.pool.run_view(run), source, run.device_pages, target)
        self._arrives(group, blocks, slots)

    def _write_back(self, group: int, blocks: Ids, slots: Ids) -> None:
        source, target = self.upload(slots), self.upload(blocks)
        for run in self.layout.runs(group):
            copy_pages(run.device_pages, source, self.pool.run_view(run), target)

    def _gather_layer(
        self,
        layer: int,
        blocks: torch.Tensor,
        host_blocks: Ids,
        out: torch.Tensor,
        after: Marker | None,  # noqa: ARG002 - all earlier use is over
    ) -> None:
        copy_pages(self.pool.layer_view(layer), blocks, out, None)
        self._is_staged(layer, host_blocks, out)
