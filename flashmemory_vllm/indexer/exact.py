"""Selector `exact`: the anchor layers' keys themselves."""

from __future__ import annotations

from typing import ClassVar

from flashmemory_kernels.summarise_keys import Kind

from flashmemory_vllm.indexer.indexed import IndexedSelector


class ExactSelector(IndexedSelector):
    """Scores a block by its exact share of attention in the anchor layers.

    The softmax runs over all history tokens and a block's share is the sum over its tokens. Costs half of an
    anchor layer's KV cache on the device for every logical block, so take few anchor layers.
    """

    name: ClassVar[str] = "exact"
    summary: ClassVar[Kind] = "exact"
