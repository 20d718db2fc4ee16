"""Selectors that look at positions only: the controls every other selector has to beat."""

from __future__ import annotations

from typing import ClassVar

import torch

from flashmemory_vllm.indexer.base import IndexGeometry, Selector
from flashmemory_vllm.indexer.places import DueRows, PlaceState


class FullSelector(Selector):
    """Selector `full`: all blocks are worth the same. Meaningful only with a resident ratio of 1."""

    name: ClassVar[str] = "full"
    is_finite: ClassVar[bool] = True
    needs_queries: ClassVar[bool] = False
    needs_keys: ClassVar[bool] = False

    def remember(self, due: DueRows, state: PlaceState) -> None:
        """Nothing of any block."""
        state.memory[0][:, due.places] = 0.0


class StreamingSelector(Selector):
    """Selector `streaming`: attention sinks and a window (StreamingLLM, arXiv 2309.17453).

    Scores by recency. The sink blocks are always resident, whatever a selector says, so the rest of the
    budget becomes the window.
    """

    name: ClassVar[str] = "streaming"
    is_finite: ClassVar[bool] = True
    needs_queries: ClassVar[bool] = False
    needs_keys: ClassVar[bool] = False

    def remember(self, due: DueRows, state: PlaceState) -> None:
        """The position of each block."""
        width = state.memory.shape[3]
        state.memory[0][:, due.places] = torch.arange(width, dtype=torch.float32, device=state.memory.device)


class RandomSelector(Selector):
    """Selector `random`: a hash of group, position and step, so that runs repeat whatever the request ids.

    Args:
        geometry: sizes.
        seed: another seed is another draw. Default: 0.
    """

    name: ClassVar[str] = "random"
    is_finite: ClassVar[bool] = True
    needs_queries: ClassVar[bool] = False
    needs_keys: ClassVar[bool] = False

    def __init__(self, geometry: IndexGeometry, seed: int = 0) -> None:
        super().__init__(geometry)
        self.seed = seed

    def remember(self, due: DueRows, state: PlaceState) -> None:
        """Uniform draws in 0..1."""
        state.memory[0][:, due.places] = self._draw(due.selections_on_device.long(), state.memory.shape[3])

    def _draw(self, selections: torch.Tensor, num_blocks: int) -> torch.Tensor:
        """Draws [G, n, num_blocks] for selections int64 [n]."""
        device = self.geometry.device
        groups = torch.arange(self.geometry.num_groups, dtype=torch.int64, device=device).view(-1, 1, 1)
        positions = torch.arange(num_blocks, dtype=torch.int64, device=device)
        hashed = _mix(_mix(_mix(groups + self.seed) + selections.unsqueeze(1)) + positions)
        # 24 bits are what a float32 mantissa holds.
        return (hashed & 0xFFFFFF).float() / (1 << 24)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 64-bit finaliser; shifts are made logical by masking the sign bits they drag in."""
    x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * -0xAE502812AA7333
    x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * -0x3B314601E57A13AD
    return x ^ ((x >> 33) & 0x7FFFFFFF)
