"""Moves pages between the host pool and the device slots: the contract, and the synchronous CPU engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from flashmemory_kernels.copy_pages import copy_pages

from flashmemory_vllm.transfer.host_pool import HostPool
from flashmemory_vllm.transfer.layout import PageLayout

Ids = npt.NDArray[np.integer]


@dataclass(slots=True)
class TransferCounters:
    """Totals since start; the worker reports them.

    Attributes:
        bytes_h2d: host to slots, recalls and prefetches.
        bytes_streamed: host to staging buffers, gathers.
        bytes_d2h: device to host, write-backs.
        late_fences: fences at which issued copies had not landed yet, so that the device waited.
    """

    bytes_h2d: int = 0
    bytes_streamed: int = 0
    bytes_d2h: int = 0
    late_fences: int = 0


class TransferEngine(ABC):
    """Executes the copies of a step plan.

    Order seen by the caller: copies run in the order of the calls, each after all device work enqueued before
    its call; the device work enqueued after `fence` runs after all copies issued before it. So issue a copy
    that may overlap a forward pass before that pass is enqueued, and one that reads its results after.
    """

    def __init__(self, layout: PageLayout, pool: HostPool) -> None:
        self.layout = layout
        self.pool = pool
        self.counters = TransferCounters()

    def recall(self, group: int, blocks: Ids, slots: Ids) -> None:
        """Copy host blocks `blocks[i]` into device slots `slots[i]`, all layers of the group."""
        if len(blocks):
            self._recall(group, blocks, slots)
            self.counters.bytes_h2d += len(blocks) * self._group_bytes(group)

    def write_back(self, group: int, blocks: Ids, slots: Ids) -> None:
        """Copy device slots `slots[i]` into host blocks `blocks[i]`, all layers of the group."""
        if len(blocks):
            self._write_back(group, blocks, slots)
            self.counters.bytes_d2h += len(blocks) * self._group_bytes(group)

    def gather_layer(self, layer: int, blocks: torch.Tensor, out: torch.Tensor) -> None:
        """Copy a layer's pages of host blocks (int64 [n] on the device) to the first rows of `out`."""
        if len(blocks):
            self._gather_layer(layer, blocks, out)
            self.counters.bytes_streamed += len(blocks) * self.layout.layer_bytes(layer)

    @abstractmethod
    def fence(self) -> None:
        """Make device work enqueued from now on wait for all issued copies; never blocks the host."""

    @abstractmethod
    def wait_gathers(self) -> None:
        """As `fence`, between the gathers of one forward pass: not counted as late."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block the host until all issued copies have landed (sleep, shutdown, tests)."""

    @abstractmethod
    def _recall(self, group: int, blocks: Ids, slots: Ids) -> None: ...

    @abstractmethod
    def _write_back(self, group: int, blocks: Ids, slots: Ids) -> None: ...

    @abstractmethod
    def _gather_layer(self, layer: int, blocks: torch.Tensor, out: torch.Tensor) -> None: ...

    def _group_bytes(self, group: int) -> int:
        return sum(self.layout.layer_bytes(layer) for layer in self.layout.groups[group])


class CpuTransferEngine(TransferEngine):
    """Copies at once on the calling thread; nothing to wait for."""

    def fence(self) -> None:
        """Nothing is in flight."""

    def wait_gathers(self) -> None:
        """Nothing is in flight."""

    def synchronize(self) -> None:
        """Nothing is in flight."""

    def _recall(self, group: int, blocks: Ids, slots: Ids) -> None:
        source, target = _index(blocks), _index(slots)
        for run in self.layout.runs(group):
            copy_pages(self.pool.run_view(run), source, run.device_pages, target)

    def _write_back(self, group: int, blocks: Ids, slots: Ids) -> None:
        source, target = _index(slots), _index(blocks)
        for run in self.layout.runs(group):
            copy_pages(run.device_pages, source, self.pool.run_view(run), target)

    def _gather_layer(self, layer: int, blocks: torch.Tensor, out: torch.Tensor) -> None:
        copy_pages(self.pool.layer_view(layer), blocks, out, None)


def _index(ids: Ids) -> torch.Tensor:
    return torch.from_numpy(ids.astype(np.int64))
