"""Checksums of pages: made from the device as blocks are written back, compared with what comes from the host."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from flashmemory_vllm.config import PageChecksums
from flashmemory_vllm.transfer.layout import PageLayout
from flashmemory_vllm.transfer.markers import Ids, Marker

# `sample` compares one of so many pages.
SAMPLED = 16
# One of how many pages is compared; None where pages have no checksums.
COMPARED: dict[PageChecksums, int | None] = {"off": None, "sample": SAMPLED, "full": 1}
# Of a page's sum on a GPU; a CPU keeps half as much.
SUM_BYTES = 8
# Odd factors that spread their products over 32 bits: Knuth's, and one of MurmurHash3's.
_NEXT_CALL, _SPREAD = 0x9E3779B1, 0x85EBCA6B


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Pages that came from the host, and whether they are what was saved.

    Attributes:
        blocks: [n] their blocks.
        wrong: uint8 [L, n], 0 where the page of a layer has its checksum; filled once `landed` is passed. On the host,
            unless there was no pinned memory for it.
        landed: behind the comparison. None if it is over.
    """

    blocks: Ids
    wrong: torch.Tensor
    landed: Marker | None

    def wrong_pages(self) -> npt.NDArray[np.bool_]:
        """Which pages [L, n] are wrong; blocks the host until it is known."""
        if self.landed is not None:
            self.landed.synchronize()
        # Anything but a 0 that was written: a comparison that never ran has found nothing right.
        wrong: npt.NDArray[np.bool_] = self.wrong.cpu().numpy() != 0
        return wrong


class PageSums(ABC):
    """Keeps a sum for each page of the host pool.

    A page that is found to be another one is filled with zeros before anything reads it: the step that does is computed
    before its requests are known to have failed, and NaN in it could end the engine for everybody.
    """

    @abstractmethod
    def store(self, group: int, blocks: Ids, slots: Ids) -> None:
        """Keep the sums of device slots `slots[i]` as those of `blocks[i]`, all layers of the group."""

    @abstractmethod
    def compare(self, group: int, blocks: Ids, slots: Ids) -> torch.Tensor:
        """Whether slots hold other pages than their blocks' sums say: uint8 [L, n], perhaps filled later."""

    @abstractmethod
    def compare_staged(self, layer: int, blocks: Ids, staged: torch.Tensor, rows: Ids) -> torch.Tensor:
        """As `compare` for one layer: uint8 [1, n], of rows of a staging buffer uint8 [m, page_bytes]."""


class CrcSums(PageSums):
    """CRC-32 by zlib, on the calling thread; for pages in host memory."""

    def __init__(self, layout: PageLayout, num_blocks: int) -> None:
        self._groups = layout.groups
        self._pages = [layout.page_view(layer).numpy() for layer in range(layout.num_layers)]
        self._sums = np.zeros((layout.num_layers, num_blocks), np.uint32)

    def store(self, group: int, blocks: Ids, slots: Ids) -> None:
        """Sum each page up."""
        for layer in self._groups[group]:
            self._sums[layer, blocks] = _crcs(self._pages[layer], slots)

    def compare(self, group: int, blocks: Ids, slots: Ids) -> torch.Tensor:
        """Sum each page up again."""
        wrong = [self._compare(layer, self._pages[layer], slots, blocks) for layer in self._groups[group]]
        return torch.from_numpy(np.stack(wrong).astype(np.uint8))

    def compare_staged(self, layer: int, blocks: Ids, staged: torch.Tensor, rows: Ids) -> torch.Tensor:
        """Sum each row up."""
        wrong = self._compare(layer, staged.numpy(), rows, blocks)
        return torch.from_numpy(wrong[None].astype(np.uint8))

    def _compare(self, layer: int, pages: npt.NDArray[np.uint8], places: Ids, blocks: Ids) -> npt.NDArray[np.bool_]:
        wrong: npt.NDArray[np.bool_] = _crcs(pages, places) != self._sums[layer, blocks]
        pages[places[wrong]] = 0
        return wrong


class PageChecks:
    """Says which pages are compared, and hands out the comparisons with the step that reads the pages.

    Args:
        sums: of all pages.
        every: one of so many pages that come in is compared.
    """

    def __init__(self, sums: PageSums, every: int) -> None:
        self._sums = sums
        self._every = every
        self._num_calls = 0
        self._issued: list[Comparison] = []
        self._in_force: list[Comparison] = []

    def leaves(self, group: int, blocks: Ids, slots: Ids) -> None:
        """Slots are about to be written back as these blocks."""
        self._sums.store(group, blocks, slots)

    def arrives(self, group: int, blocks: Ids, slots: Ids, landed: Callable[[], Marker | None]) -> None:
        """Blocks have been copied into slots by work enqueued before; in force after the next `fence`.

        Args:
            group: layer group.
            blocks: [n] blocks.
            slots: [n] their slots.
            landed: marks the work enqueued so far.
        """
        chosen = self._choose(blocks)
        if chosen.size:
            wrong = self._sums.compare(group, blocks[chosen], slots[chosen])
            self._issued.append(Comparison(blocks[chosen], wrong, landed()))

    def is_staged(self, layer: int, blocks: Ids, staged: torch.Tensor, landed: Callable[[], Marker | None]) -> None:
        """As `arrives`, for one layer's pages of blocks in the first rows of a staging buffer; in force at once."""
        chosen = self._choose(blocks)
        if chosen.size:
            wrong = self._sums.compare_staged(layer, blocks[chosen], staged, chosen)
            self._in_force.append(Comparison(blocks[chosen], wrong, landed()))

    def fence(self) -> None:
        """Work enqueued from now on may read all that has arrived."""
        self._in_force += self._issued
        self._issued = []

    def take(self) -> tuple[Comparison, ...]:
        """The comparisons of what the work enqueued so far reads and no work before it did."""
        taken, self._in_force = tuple(self._in_force), []
        return taken

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Compare every page inside, so that each kernel has run once; the results are dropped."""
        every, self._every = self._every, 1
        try:
            yield
        finally:
            self._every = every
            self._issued, self._in_force = [], []

    def _choose(self, blocks: Ids) -> Ids:
        """Places [k] of the pages to compare: in every call others, none in step with anything that has a period."""
        if self._every == 1:
            return np.arange(len(blocks))
        self._num_calls += 1
        shift = np.uint32(self._num_calls * _NEXT_CALL & 0xFFFFFFFF)
        spread = (blocks.astype(np.uint32) + shift) * np.uint32(_SPREAD)
        return np.flatnonzero(spread.astype(np.uint64) * np.uint64(self._every) < np.uint64(1 << 32))


def _crcs(pages: npt.NDArray[np.uint8], ids: Ids) -> npt.NDArray[np.uint32]:
    return np.array([zlib.crc32(pages[index]) for index in ids.tolist()], np.uint32)
