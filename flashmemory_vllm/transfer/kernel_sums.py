"""Checksums of pages on a GPU: one kernel for all layers of a group, which writes its result to pinned memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from flashmemory_kernels.checksum_pages import PageSet, store_checksums, verify_checksums

from flashmemory_vllm.transfer.checksums import PageSums
from flashmemory_vllm.transfer.layout import PageLayout
from flashmemory_vllm.transfer.markers import Ids
from flashmemory_vllm.transfer.pinned import writable_by_kernels

# What a kernel has not answered yet.
_UNANSWERED = 2


class _Part(NamedTuple):
    """Layers of a group whose pages lie equally far apart.

    Attributes:
        pages: their device pages.
        sums: int64 [L, N] on the device.
    """

    pages: PageSet
    sums: torch.Tensor


class KernelSums(PageSums):
    """64-bit sums on the device, made and compared in the order of the current stream.

    Args:
        layout: where pages lie.
        num_blocks: N, blocks of the host pool.
        upload: puts ids on the device in the order of the current stream.
    """

    def __init__(self, layout: PageLayout, num_blocks: int, upload: Callable[[Ids], torch.Tensor]) -> None:
        self._upload = upload
        self._sums = torch.zeros(layout.num_layers, num_blocks, dtype=torch.int64, device=layout.device)
        self._parts: list[list[_Part]] = []
        self._row_of: dict[int, int] = {}
        for group in layout.groups:
            alike: dict[tuple[int, int], list[int]] = {}
            for layer in group:
                pages = layout.page_view(layer)
                alike.setdefault((pages.shape[1], pages.stride(0)), []).append(layer)
            self._parts.append([self._part(layout, layers) for layers in alike.values()])
        self._staged: dict[tuple[int, tuple[int, ...]], PageSet] = {}

    def store(self, group: int, blocks: Ids, slots: Ids) -> None:
        """Launch the kernel."""
        on_device = self._upload(np.stack((slots, blocks)))
        for part in self._parts[group]:
            store_checksums(part.pages, on_device[0], part.sums, on_device[1])

    def compare(self, group: int, blocks: Ids, slots: Ids) -> torch.Tensor:
        """Launch the kernel; pinned where there is such memory, filled by it."""
        parts, on_device = self._parts[group], self._upload(np.stack((slots, blocks)))
        wrong = self._unanswered(sum(len(part.pages) for part in parts), len(blocks))
        done = 0
        for part in parts:
            of_part = wrong[done : done + len(part.pages)]
            verify_checksums(part.pages, on_device[0], part.sums, on_device[1], of_part)
            done += len(part.pages)
        return wrong

    def compare_staged(self, layer: int, blocks: Ids, staged: torch.Tensor, rows: Ids) -> torch.Tensor:
        """Launch the kernel; pinned where there is such memory, filled by it."""
        place = (staged.data_ptr(), tuple(staged.shape))
        if place not in self._staged:
            self._staged[place] = PageSet([staged])
        row, on_device = self._row_of[layer], self._upload(np.stack((rows, blocks)))
        wrong = self._unanswered(1, len(blocks))
        verify_checksums(self._staged[place], on_device[0], self._sums[row : row + 1], on_device[1], wrong)
        return wrong

    def _part(self, layout: PageLayout, layers: list[int]) -> _Part:
        start = len(self._row_of)
        self._row_of |= {layer: start + place for place, layer in enumerate(layers)}
        return _Part(PageSet([layout.page_view(layer) for layer in layers]), self._sums[start : start + len(layers)])

    def _unanswered(self, num_layers: int, num_blocks: int) -> torch.Tensor:
        values = torch.full((num_layers, num_blocks), _UNANSWERED, dtype=torch.uint8)
        return writable_by_kernels(values, self._sums.device)
