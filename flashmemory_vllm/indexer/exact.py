"""Selector `exact`: the anchor layers' keys themselves."""

from __future__ import annotations

from typing import ClassVar

from flashmemory_kernels.common import Aggregate

from flashmemory_vllm.indexer.base import IndexGeometry
from flashmemory_vllm.indexer.indexed import IndexedSelector
from flashmemory_vllm.own_options import IndexDtype


class ExactSelector(IndexedSelector):
    """Scores a block by its exact share of attention in the anchor layers.

    The softmax runs over all history tokens and a block's share is the sum over its tokens. Costs half of an
    anchor layer's KV cache on the device for every logical block, a quarter in fp8, so take few anchor layers.

    Args:
        geometry: sizes; every layer group needs an anchor layer.
        aggregate: how heads and layers are combined, "max" or "mean". Default: "max".
        memory_decay: what a share is still worth a token later. Default: 0, nothing.
        question_share: what the question's share adds to a block's worth from then on. Default: 0, nothing.
        index_dtype: "auto" to keep keys as they are, "fp8" for codes of a byte with a scale for each block and KV head.
            Default: "auto".
    """

    name: ClassVar[str] = "exact"

    def __init__(
        self,
        geometry: IndexGeometry,
        aggregate: Aggregate = "max",
        memory_decay: float = 0.0,
        question_share: float = 0.0,
        index_dtype: IndexDtype = "auto",
    ) -> None:
        self.summary = "exact_fp8" if index_dtype == "fp8" else "exact"
        super().__init__(geometry, aggregate, memory_decay, question_share)
