"""Selector `mean`: one mean key per block and KV head."""

from __future__ import annotations

from typing import ClassVar

import torch
from flashmemory_kernels.summarise_keys import summarise_keys

from flashmemory_vllm.indexer.indexed import IndexedSelector


class MeanSelector(IndexedSelector):
    """Cheapest index, 1 / (2 * block_size) of an anchor layer's page; needles drown among neighbours."""

    name: ClassVar[str] = "mean"

    def _row_shape(self) -> tuple[int, int]:
        return 1, self.geometry.head_dim

    def _summarise(self, keys: torch.Tensor) -> torch.Tensor:
        return summarise_keys(keys, "mean")
