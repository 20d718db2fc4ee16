"""The contract of every selector: index keys in, what each block is remembered for out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from flashmemory_kernels.remember_shares import Channel

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.indexer.places import DueRows, MemoryKind, PlaceState


@dataclass(frozen=True, slots=True)
class IndexGeometry:
    """Sizes a selector allocates its index from; filled by the worker once the KV cache is laid out.

    Attributes:
        num_logical_blocks: N, ids the scheduler may hand out.
        block_size: tokens in a block.
        num_query_heads: query heads of this rank.
        num_kv_heads: KV heads of this rank; divides `num_query_heads`.
        head_dim: elements of one key.
        softmax_scale: factor on `q . k` in the model's attention.
        anchor_layers: attention-layer indices whose queries and keys feed the selector (A of them).
        layer_groups: layer group of each anchor layer, same length.
        num_groups: G, resident sets of a request.
        dtype: dtype of the index keys, the model's own.
        device: where the index keys live.
    """

    num_logical_blocks: int
    block_size: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    softmax_scale: float
    anchor_layers: tuple[int, ...]
    layer_groups: tuple[int, ...]
    num_groups: int
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        if self.num_query_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_query_heads must be a multiple of num_kv_heads ({self.num_kv_heads}); got {self.num_query_heads}"
            )
        if len(self.layer_groups) != len(self.anchor_layers):
            raise ConfigError(
                f"layer_groups must name one group per anchor layer; got {len(self.layer_groups)} groups "
                f"for anchor layers {self.anchor_layers}"
            )
        if not set(self.layer_groups) <= set(range(self.num_groups)):
            raise ConfigError(f"layer_groups must lie in 0..{self.num_groups - 1}; got {self.layer_groups}")


class Selector(ABC):
    """Says what each block of a request is worth, 0 or more; what is worth more gets a slot.

    One instance serves all requests of a worker from one thread. `add_blocks` and `remember` enqueue work on the
    current stream and never wait for the device.

    Attributes:
        is_finite: whether `remember` never writes a NaN or an infinity, so that nobody needs to look. Default: False.
    """

    is_finite: ClassVar[bool] = False

    name: ClassVar[str]
    needs_queries: ClassVar[bool]
    needs_keys: ClassVar[bool]

    def __init__(self, geometry: IndexGeometry) -> None:
        self.geometry = geometry

    @property
    def memory_kind(self) -> MemoryKind:
        """What is remembered of a block. Default: its last score."""
        return MemoryKind((Channel(0.0),))

    @abstractmethod
    def remember(self, due: DueRows, state: PlaceState) -> None:
        """Bring the memory of requests up to date with their newest queries, for all of their full blocks.

        Args:
            due: the requests.
            state: whose `memory[:, :, place, :n]` is changed, n the full blocks of the request at a place.
        """

    @property
    def score_threshold(self) -> float | None:
        """Score below which a block is not worth a slot; None if the selector has no such notion."""
        return None

    def bytes_per_block(self) -> int:
        """Device bytes of index keys per logical block, all anchor layers together."""
        return 0

    def add_blocks(  # noqa: B027 - optional
        self, block_ids: torch.Tensor, keys: Sequence[torch.Tensor], slots: Sequence[torch.Tensor] | None = None
    ) -> None:
        """Make the index keys of blocks that became full; mutates the index in place.

        Args:
            block_ids: int64 [n], logical block ids, distinct.
            keys: per anchor layer the keys after RoPE of all its device pages, [S, Hkv, block_size, D] with any
                strides; of these blocks alone, [n, Hkv, block_size, D], if `slots` is None.
            slots: per anchor layer int64 [n], the slot of each block. Default: the keys are gathered already.
        """

    def forget(self, req_id: str) -> None:  # noqa: B027 - optional
        """Drop what is kept for a request that ended; unknown ids are fine.

        What is kept outlives a preemption. The request comes back with equal tokens at equal positions, in other blocks
        maybe, and sometimes with a block less than it was last scored with: a step under way may have been in vain.
        """
