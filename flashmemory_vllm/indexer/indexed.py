"""What the selectors with index keys share: storage, and scores by attention mass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from flashmemory_kernels.score_blocks import score_blocks

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.indexer.aggregation import Aggregate, aggregate_mass, check_aggregate
from flashmemory_vllm.indexer.base import IndexGeometry, ScoringRequest, Selector


class IndexedSelector(Selector):
    """Keeps R rows of E elements per block, KV head and anchor layer; scores blocks by softmax share.

    A subclass says how a block's keys become rows (`_summarise`) and how a query is laid out against a row
    (`_expand`). The index [A, N, Hkv, R, E] is allocated once; rows of blocks never added are uninitialised.

    Args:
        geometry: sizes; every layer group needs an anchor layer.
        aggregate: how heads and layers are combined, "max" or "mean". Default: "max".

    Raises:
        ConfigError: a group has no anchor layer, or `aggregate` is unknown.
    """

    needs_queries: ClassVar[bool] = True
    needs_keys: ClassVar[bool] = True

    def __init__(self, geometry: IndexGeometry, aggregate: Aggregate = "max") -> None:
        super().__init__(geometry)
        check_aggregate(aggregate)
        missing = sorted(set(range(geometry.num_groups)) - set(geometry.layer_groups))
        if missing:
            raise ConfigError(
                f"selector {self.name!r}: each layer group needs an anchor layer; groups {missing} have none"
            )
        self.aggregate: Aggregate = aggregate
        num_rows, width = self._row_shape()
        self.index = torch.empty(
            len(geometry.anchor_layers),
            geometry.num_logical_blocks,
            geometry.num_kv_heads,
            num_rows,
            width,
            dtype=geometry.dtype,
            device=geometry.device,
        )

    def bytes_per_block(self) -> int:
        """Device bytes of index keys per logical block, all anchor layers together."""
        return self.index[:, 0].numel() * self.index.element_size()

    def add_blocks(self, block_ids: torch.Tensor, keys: Sequence[torch.Tensor]) -> None:
        """Make the index keys of blocks that became full; see `Selector.add_blocks`."""
        for rows, layer_keys in zip(self.index, keys, strict=True):
            rows.index_copy_(0, block_ids, self._summarise(layer_keys).to(rows.dtype))

    def score(self, request: ScoringRequest) -> torch.Tensor:
        """Share of each block in the attention of the request's last token."""
        return self._aggregate(self._log_mass(request))

    def _log_mass(self, request: ScoringRequest) -> list[torch.Tensor]:
        """Per anchor layer the log-mass of each block, float32 [Hq, n]."""
        if request.queries is None:
            raise ConfigError(f"selector {self.name!r} needs queries; request {request.req_id!r} came without")
        return [
            score_blocks(self._expand(query), rows, request.block_ids, self.geometry.softmax_scale)
            for query, rows in zip(request.queries, self.index, strict=True)
        ]

    def _aggregate(self, log_mass: list[torch.Tensor]) -> torch.Tensor:
        return aggregate_mass(log_mass, self.geometry.layer_groups, self.geometry.num_groups, self.aggregate)

    @abstractmethod
    def _row_shape(self) -> tuple[int, int]:
        """(R, E)."""

    @abstractmethod
    def _summarise(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys [n, Hkv, block_size, D] to rows [n, Hkv, R, E]."""

    def _expand(self, query: torch.Tensor) -> torch.Tensor:
        """Query [Hq, D] to [Hq, E]."""
        return query
