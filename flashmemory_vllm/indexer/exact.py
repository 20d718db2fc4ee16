"""Selector `exact`: the anchor layers' keys themselves."""

from __future__ import annotations

from typing import ClassVar

import torch

from flashmemory_vllm.indexer.indexed import IndexedSelector


class ExactSelector(IndexedSelector):
    """Scores a block by its exact share of attention in the anchor layers.

    The softmax runs over all history tokens and a block's share is the sum over its tokens. Costs half of an
    anchor layer's KV cache on the device for every logical block, so take few anchor layers.
    """

    name: ClassVar[str] = "exact"

    def _row_shape(self) -> tuple[int, int]:
        return self.geometry.block_size, self.geometry.head_dim

    def _summarise(self, keys: torch.Tensor) -> torch.Tensor:
        return keys
