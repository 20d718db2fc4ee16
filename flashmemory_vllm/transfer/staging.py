"""A ring of staging buffers on the device, kept full ahead of the forward pass that reads them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.transfer.engine import Ids, Marker, TransferEngine
from flashmemory_vllm.transfer.layout import POISON

# One is read, one is ready, one is being filled.
NUM_STAGING_BUFFERS = 3


@dataclass(frozen=True, slots=True, eq=False)
class HistoryPart:
    """Full blocks of a request's history that fit into one staging buffer.

    Attributes:
        blocks: int64 [n], from `TransferEngine.upload`.
        host_blocks: int32 [n], the same blocks on the host.
    """

    blocks: torch.Tensor
    host_blocks: Ids


def split_history(blocks: torch.Tensor, host_blocks: Ids, staging_blocks: int) -> tuple[HistoryPart, ...]:
    """Split history into as few parts as possible, of about the same size, oldest first.

    Args:
        blocks: int64 [n], from `TransferEngine.upload`.
        host_blocks: int32 [n], the same blocks on the host.
        staging_blocks: pages of one staging buffer.
    """
    num_blocks = len(host_blocks)
    num_parts = -(-num_blocks // staging_blocks)
    bounds = [num_blocks * part // num_parts for part in range(num_parts + 1)]
    return tuple(HistoryPart(blocks[start:end], host_blocks[start:end]) for start, end in pairwise(bounds))


@dataclass(slots=True, eq=False)
class _Buffer:
    """One staging buffer.

    Attributes:
        pages: uint8 [staging_blocks, page_bytes].
        drained: the last use of what it holds; at first what came before the ring, when the memory was another's.
        filled: what it is filled with has landed.
        holds: layer and part that it is filled with.
    """

    pages: torch.Tensor
    drained: Marker | None
    filled: Marker | None = None
    holds: tuple[int, HistoryPart] | None = None


class StagingRing:
    """Fetches the parts of a forward pass in the order of their use, as far ahead as there are buffers.

    What comes next is known before the pass begins, so fetching crosses from one layer to the next: the copies
    wait for a free buffer and for nothing else, and while they keep up attention never waits for them.

    Args:
        engine: moves the pages.
        staging: uint8 [K, staging_blocks, page_bytes] on the device, K buffers for the largest pages.
        poison: fill a buffer with NaN before each fetch. Default: False.
    """

    def __init__(self, engine: TransferEngine, staging: torch.Tensor, poison: bool = False) -> None:
        self.staging_blocks = staging.shape[1]
        self._engine = engine
        self._poison = poison
        self._buffers = [_Buffer(pages, engine.marker()) for pages in staging]
        self._filled: deque[_Buffer] = deque()
        self._schedule: Iterator[tuple[int, HistoryPart]] = iter(())

    def begin(self, schedule: Iterable[tuple[int, HistoryPart]]) -> None:
        """Begin to fetch for a forward pass.

        Args:
            schedule: layer and part of each fetch, in the order in which `part` will be asked for them.
        """
        # Left from a pass that was cut short: work that reads them may be enqueued.
        for buffer in self._filled:
            buffer.drained = self._engine.marker()
        self._filled.clear()
        self._schedule = iter(schedule)
        for buffer in self._buffers:
            self._fill(buffer)

    @contextmanager
    def part(self, layer: int, part: HistoryPart) -> Iterator[torch.Tensor]:
        """The next part's pages uint8 [n, page_bytes]; device work enqueued inside may read them.

        Args:
            layer: attention layer.
            part: what the schedule has next.

        Raises:
            IntegrityError: the schedule has something else next.
        """
        if not self._filled or self._filled[0].holds != (layer, part):
            holds = self._filled[0].holds if self._filled else None
            raise IntegrityError(
                f"layer {layer} asks for {len(part.host_blocks)} streamed blocks; staged next is "
                + ("nothing" if holds is None else f"layer {holds[0]} with {len(holds[1].host_blocks)} blocks")
            )
        buffer = self._filled.popleft()
        self._engine.wait(buffer.filled)
        yield self._of_layer(buffer, layer)[: len(part.host_blocks)]
        buffer.drained = self._engine.marker()
        self._fill(buffer)

    def _fill(self, buffer: _Buffer) -> None:
        buffer.holds = next(self._schedule, None)
        if buffer.holds is None:
            return
        if self._poison:
            buffer.pages.fill_(POISON)
            buffer.drained = self._engine.marker()
        layer, part = buffer.holds
        pages = self._of_layer(buffer, layer)
        buffer.filled = self._engine.gather_layer(layer, part.blocks, part.host_blocks, pages, buffer.drained)
        self._filled.append(buffer)

    def _of_layer(self, buffer: _Buffer, layer: int) -> torch.Tensor:
        return buffer.pages[:, : self._engine.layout.layer_bytes(layer)]
