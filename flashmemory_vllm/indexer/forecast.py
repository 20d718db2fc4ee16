"""What a trained head makes of the memory of a request's blocks, in serving."""

from __future__ import annotations

from dataclasses import replace

import torch
from flashmemory_kernels.common.due_rows import Due
from flashmemory_kernels.forecast_blocks import NUM_OTHERS, forecast_blocks
from flashmemory_kernels.remember_shares import Channel, Channels

from flashmemory_vllm.indexer.base import IndexGeometry
from flashmemory_vllm.indexer.exact import ExactSelector
from flashmemory_vllm.indexer.forecast_model import ForecastHead
from flashmemory_vllm.indexer.places import DueRows, MemoryKind, PlaceState
from flashmemory_vllm.indexer.shares import remember_rows
from flashmemory_vllm.own_options import IndexDtype


class Forecast:
    """Keeps the exact keys that shares are made of, and applies a head to what is remembered of them.

    A memory has C channels of shares, logits by the newest query and by the question, and the forecast.

    Args:
        head: as trained.
        geometry: sizes.
        index_dtype: how keys are kept.

    Attributes:
        keys: of the anchor layers.
    """

    def __init__(self, head: ForecastHead, geometry: IndexGeometry, index_dtype: IndexDtype) -> None:
        self.keys = ExactSelector(geometry, index_dtype=index_dtype)
        self._head, self._block_size = head.weights(), geometry.block_size
        self._shares = tuple(map(Channel, head.decays))
        self._channels = Channels.of(self._shares, geometry.device)

    @property
    def memory_kind(self) -> MemoryKind:
        """Of all tokens; the forecast alone is what a block is worth."""
        channels = (*self._shares, *[Channel(0.0)] * NUM_OTHERS)
        return MemoryKind(channels, num_queries=0, num_inner=len(channels) - 1)

    def remember_shares(self, due: DueRows, state: PlaceState) -> DueRows:
        """Bring the shares that tokens paid up to date.

        Returns:
            The rows. Those of requests that come back are one token older, and ask with that alone: what their question
            paid is remembered.
        """
        if due.is_entering:
            rows = due.on_device.clone()
            is_back, asked = rows[:, Due.NUM_KNOWN] > 0, rows[:, Due.NUM_QUERIES]
            rows[:, Due.NUM_QUERIES] = torch.where(is_back, asked.clamp(max=1), asked)
            rows[:, Due.ELAPSED] = torch.where(is_back, 1, rows[:, Due.ELAPSED])
            due = replace(due, on_device=rows)
        paid = replace(state, memory=state.memory[:-NUM_OTHERS])
        remember_rows(due, paid, self.keys.keys, self._channels)
        return due

    def make(self, due: DueRows, state: PlaceState) -> None:
        """Write the forecast, once all else is up to date."""
        forecast_blocks(state.memory, due.on_device, self._head, self._block_size)
