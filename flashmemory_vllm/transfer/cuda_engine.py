"""The CUDA engine: all copies on one side stream, ordered against the compute stream by events."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from flashmemory_kernels.copy_pages import copy_pages

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.transfer.engine import Ids, TransferEngine
from flashmemory_vllm.transfer.host_pool import HostPool
from flashmemory_vllm.transfer.layout import PageLayout


class CudaTransferEngine(TransferEngine):
    """Copies beside the model: recalls, write-backs and gathers share one stream and so keep their order.

    A recall after the write-back of the same block reads what was written; a copy waits for the compute
    stream as it stands at the call (the last reader of the slots it overwrites, the writer of the slots it
    saves).

    Raises:
        ConfigError: the host pool is not pinned.
    """

    def __init__(self, layout: PageLayout, pool: HostPool) -> None:
        super().__init__(layout, pool)
        if not pool.pages.is_pinned():
            raise ConfigError("the CUDA transfer engine needs a pinned host pool; got pageable memory (pin=False)")
        self._copy_stream = torch.cuda.Stream(layout.device)  # type: ignore[no-untyped-call]
        self._landed = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def fence(self) -> None:
        """Make the compute stream wait for all issued copies; late when they are not done yet."""
        self.counters.late_fences += not self._landed.query()  # type: ignore[no-untyped-call]
        self.wait_gathers()

    def wait_gathers(self) -> None:
        """Make the compute stream wait for all issued copies."""
        torch.cuda.current_stream(self.layout.device).wait_event(self._landed)

    def synchronize(self) -> None:
        """Block the host until all issued copies have landed."""
        self._copy_stream.synchronize()

    def _recall(self, group: int, blocks: Ids, slots: Ids) -> None:
        with self._copying():
            source, target = self._upload(blocks, slots)
            for run in self.layout.runs(group):
                copy_pages(self.pool.run_view(run), source, run.device_pages, target)

    def _write_back(self, group: int, blocks: Ids, slots: Ids) -> None:
        with self._copying():
            source, target = self._upload(slots, blocks)
            for run in self.layout.runs(group):
                copy_pages(run.device_pages, source, self.pool.run_view(run), target)

    def _gather_layer(self, layer: int, blocks: torch.Tensor, out: torch.Tensor) -> None:
        with self._copying():
            copy_pages(self.pool.layer_view(layer), blocks, out, None)
        # Both belong to the compute stream; without this their memory could be reused while the copy still
        # runs.
        blocks.record_stream(self._copy_stream)
        out.record_stream(self._copy_stream)

    @contextmanager
    def _copying(self) -> Iterator[None]:
        self._copy_stream.wait_stream(torch.cuda.current_stream(self.layout.device))
        with torch.cuda.stream(self._copy_stream):
            yield
            self._landed.record()

    def _upload(self, source: Ids, target: Ids) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.from_numpy(np.stack((source, target)).astype(np.int64)).pin_memory()
        source_ids, target_ids = both.to(self.layout.device, non_blocking=True)
        return source_ids, target_ids
