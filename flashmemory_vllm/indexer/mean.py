"""Selector `mean`: one mean key per block and KV head."""

from __future__ import annotations

from typing import ClassVar

from flashmemory_kernels.summarise_keys import Kind

from flashmemory_vllm.indexer.indexed import IndexedSelector


class MeanSelector(IndexedSelector):
    """Cheapest index, 1 / (2 * block_size) of an anchor layer's page; needles drown among neighbours."""

    name: ClassVar[str] = "mean"
    summary: Kind = "mean"
