"""What the selectors with index keys share: storage, and scores by attention mass."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import ClassVar, get_args

import torch
from flashmemory_kernels.common import Aggregate
from flashmemory_kernels.remember_shares import Channel, Channels
from flashmemory_kernels.score_chunks import CODE_DTYPE
from flashmemory_kernels.summarise_keys import Kind, row_shape, summarise_keys

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.indexer.base import IndexGeometry, Selector
from flashmemory_vllm.indexer.places import DueRows, MemoryKind, PlaceState
from flashmemory_vllm.indexer.shares import KeyIndex, remember_rows


class IndexedSelector(Selector):
    """Keeps R rows of E elements per block, KV head and anchor layer; scores blocks by softmax share.

    A subclass says how a block's keys become rows (`summary`). The index [A, N, Hkv, R, E], for rows in fp8 with scales
    [A, N, Hkv], is allocated once; rows of blocks never added are uninitialised.

    Args:
        geometry: sizes; every layer group needs an anchor layer.
        aggregate: how heads and layers are combined, "max" or "mean". Default: "max".
        memory_decay: what a share is still worth a token later; a block is remembered for the best of them.
            Default: 0, nothing.
        question_share: what the share that a request's question paid to a block adds to its worth from then on.
            Default: 0, nothing.

    Raises:
        ConfigError: a group has no anchor layer, or `aggregate` is unknown.
    """

    is_finite: ClassVar[bool] = True
    needs_queries: ClassVar[bool] = True
    needs_keys: ClassVar[bool] = True
    summary: Kind

    def __init__(
        self,
        geometry: IndexGeometry,
        aggregate: Aggregate = "max",
        memory_decay: float = 0.0,
        question_share: float = 0.0,
    ) -> None:
        super().__init__(geometry)
        if aggregate not in get_args(Aggregate):
            raise ConfigError(f"aggregate must be one of {', '.join(get_args(Aggregate))}; got {aggregate!r}")
        missing = sorted(set(range(geometry.num_groups)) - set(geometry.layer_groups))
        if missing:
            raise ConfigError(
                f"selector {self.name!r}: each layer group needs an anchor layer; groups {missing} have none"
            )
        self.aggregate: Aggregate = aggregate
        self._memory_decay, self._question_share = memory_decay, question_share
        channels = self.memory_kind.channels
        self._channels = Channels.of(channels, geometry.device)
        # A question asks with all of its tokens alike
        self._entering = Channels.of([Channel(1.0, aggregate)] * len(channels), geometry.device)
        self._layer_groups = torch.tensor(geometry.layer_groups, dtype=torch.int32, device=geometry.device)
        size = (len(geometry.anchor_layers), geometry.num_logical_blocks, geometry.num_kv_heads)
        rows, is_fp8 = row_shape(self.summary, geometry.block_size, geometry.head_dim), self.summary == "exact_fp8"
        dtype = CODE_DTYPE if is_fp8 else geometry.dtype
        self.index = torch.empty(*size, *rows, dtype=dtype, device=geometry.device)
        self.scales = torch.empty(size, device=geometry.device) if is_fp8 else None
        # Whether blocks came gathered or in slots: all that a runtime gives is alike
        self._checked: set[bool] = set()
        self._keys = KeyIndex(self.index, self.scales, self._layer_groups, geometry.softmax_scale)

    def bytes_per_block(self) -> int:
        """Device bytes of index keys per logical block, all anchor layers together."""
        parts = [self.index] if self.scales is None else [self.index, self.scales]
        return sum(part[:, 0].numel() * part.element_size() for part in parts)

    def add_blocks(
        self, block_ids: torch.Tensor, keys: Sequence[torch.Tensor], slots: Sequence[torch.Tensor] | None = None
    ) -> None:
        """Make the index keys of blocks that became full; see `Selector.add_blocks`."""
        layer_slots = repeat(None, len(keys)) if slots is None else slots
        scales = repeat(None, len(keys)) if self.scales is None else self.scales
        is_checked = (slots is None) in self._checked
        for rows, pages, in_slots, of_rows in zip(self.index, keys, layer_slots, scales, strict=True):
            summarise_keys(pages, in_slots, rows, block_ids, self.summary, of_rows, is_checked=is_checked)
        self._checked.add(slots is None)

    @property
    def memory_kind(self) -> MemoryKind:
        """The largest share that a token paid to a block, each fading with its age; beside it the question's."""
        newest, num_queries = Channel(self._memory_decay, self.aggregate), 0 if self._memory_decay else 1
        if not self._question_share:
            return MemoryKind((newest,), num_queries=num_queries)
        # Later shares have no weight in it
        asked = Channel(1.0, self.aggregate, "rms")
        return MemoryKind((newest, asked), (1.0, self._question_share), "sum", num_queries)

    def remember(self, due: DueRows, state: PlaceState) -> None:
        """Attention shares of all rows in one pass over their keys; see `Selector.remember`."""
        remember_rows(due, state, self.keys, self._entering if due.is_entering else self._channels)

    @property
    def keys(self) -> KeyIndex:
        """The index keys, as shares are made of them."""
        return self._keys
