"""A transfer engine that makes every copy as late as its contract allows.

Until a recall is in place its slots hold NaN, and until a write-back has run it reads whatever lies in its slots by
then. Whoever reads or overwrites too early, or forgets to wait, sees it in the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from flashmemory_vllm.residency.types import NOTHING, Copies
from flashmemory_vllm.transfer.engine import CpuTransferEngine, Ids, Marker
from flashmemory_vllm.transfer.host_pool import HostPool
from flashmemory_vllm.transfer.layout import POISON, PageLayout


class _Copies(NamedTuple):
    group: int
    blocks: Ids
    slots: Ids


class LateEngine(CpuTransferEngine):
    """Recalls land at the next fence, write-backs when somebody needs their blocks or slots."""

    def __init__(self, layout: PageLayout, pool: HostPool, compared: int | None = None) -> None:
        super().__init__(layout, pool, compared)
        pool.poison()
        self._recalls: list[_Copies] = []
        self._write_backs: list[_Copies] = []

    def fence(self, reused: Sequence[Copies]) -> None:
        """Recalls land; write-backs of reused slots are made, for what follows overwrites those."""
        for recall in self._recalls:
            super()._recall(*recall, None)
        self._recalls.clear()
        for use in reused:
            self._make_those_of(use.group, slots=use.slots)
        super().fence(reused)

    def synchronize(self) -> None:
        """All copies are made."""
        self._make(len(self._write_backs))
        self.fence(())

    def _recall(self, group: int, blocks: Ids, slots: Ids, after: Marker | None) -> None:  # noqa: ARG002 - is over
        self._make_those_of(group, blocks, slots)
        for layer in self.layout.groups[group]:
            self.layout.page_view(layer)[torch.from_numpy(slots.astype(np.int64))] = POISON
        self._recalls.append(_Copies(group, blocks, slots))

    def _write_back(self, group: int, blocks: Ids, slots: Ids) -> None:
        self._write_backs.append(_Copies(group, blocks, slots))

    def _gather_layer(
        self, layer: int, blocks: torch.Tensor, host_blocks: Ids, out: torch.Tensor, after: Marker | None
    ) -> None:
        (group,) = (group for group, layers in enumerate(self.layout.groups) if layer in layers)
        self._make_those_of(group, host_blocks)
        super()._gather_layer(layer, blocks, host_blocks, out, after)

    def _make_those_of(self, group: int, blocks: Ids = NOTHING, slots: Ids = NOTHING) -> None:
        """Make the write-backs up to the last that touches any of these: they land one after the other."""
        needed = (
            index + 1
            for index, one in enumerate(self._write_backs)
            if one.group == group and (np.isin(one.blocks, blocks) | np.isin(one.slots, slots)).any()
        )
        self._make(max(needed, default=0))

    def _make(self, count: int) -> None:
        for write_back in self._write_backs[:count]:
            super()._write_back(*write_back)
        del self._write_backs[:count]
