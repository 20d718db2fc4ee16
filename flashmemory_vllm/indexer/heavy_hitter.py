"""Selector `h2o`: blocks that gathered most attention so far (Heavy-Hitter Oracle, arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from flashmemory_kernels.common import Aggregate
from flashmemory_kernels.common.due_rows import Due
from flashmemory_kernels.remember_shares import Channel
from flashmemory_kernels.score_rows import OnlySets

from flashmemory_vllm.indexer.base import IndexGeometry
from flashmemory_vllm.indexer.exact import ExactSelector
from flashmemory_vllm.indexer.places import DueRows, MemoryKind, PlaceState
from flashmemory_vllm.indexer.shares import only_rows, remember_rows
from flashmemory_vllm.own_options import IndexDtype


class HeavyHitterSelector(ExactSelector):
    """Accumulates attention mass per request; the blocks that gathered least are evicted.

    An approximation of the paper, which sums the attention weights of every query: attention kernels return
    no weights, so mass is taken from the captured queries at each selection only, over the exact keys of the
    anchor layers. The first selection sees all blocks. After it only blocks in the resident set gain mass,
    from a softmax over that set, as attention itself sees no other: an evicted block comes back only if
    nothing beats the mass it had.

    Args:
        geometry: sizes; every layer group needs an anchor layer.
        aggregate: how heads and layers are combined before mass is added up. Default: "max".
        index_dtype: see `ExactSelector`. Default: "auto".
    """

    name: ClassVar[str] = "h2o"

    def __init__(self, geometry: IndexGeometry, aggregate: Aggregate = "max", index_dtype: IndexDtype = "auto") -> None:
        super().__init__(geometry, aggregate, index_dtype=index_dtype)

    @property
    def memory_kind(self) -> MemoryKind:
        """The sum of all shares so far."""
        return MemoryKind((Channel(1.0, self.aggregate, "sum"),))

    def remember(self, due: DueRows, state: PlaceState) -> None:
        """Add the mass of each request's last token; of a question that is seen first, the largest of its tokens'."""
        if not due.is_entering:
            remember_rows(due, state, self.keys, self._channels, OnlySets(state.in_set, self._layer_groups))
            return
        is_back = due.on_device[:, Due.NUM_KNOWN] > 0
        asking = replace(due, on_device=only_rows(due.on_device, ~is_back))
        remember_rows(asking, state, self.keys, self._entering)
        if due.fields[:, Due.NUM_KNOWN].any():
            # What their questions asked for is in their mass
            fields, rows = due.fields.copy(), only_rows(due.on_device, is_back)
            fields[:, Due.NUM_QUERIES] = fields[:, Due.NUM_QUERIES].clip(max=1)
            rows[:, Due.NUM_QUERIES].clamp_(max=1)
            remember_rows(replace(due, fields=fields, on_device=rows), state, self.keys, self._channels)
