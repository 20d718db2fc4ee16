"""What a device knows of decoding requests by place, and the rows of a step that bring it up to date."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from flashmemory_kernels.common.due_rows import Due
from flashmemory_kernels.remember_shares import Channel

from flashmemory_vllm.residency.types import IntArray


class MemoryKind(NamedTuple):
    """What a selector remembers of each block, and how that becomes one number.

    Attributes:
        channels: one number a block each. Selectors that do not score by shares of attention write them as they like.
        weights: of each channel. Default: 1.
        combine: whether the channels are added up, each with its weight, or the largest counts.
        num_queries: newest queries of a request that a later selection reads; 0: of all tokens since the last one.
        num_inner: first channels that say nothing of a block's worth, and have no weight; the selector reads them.
    """

    channels: tuple[Channel, ...]
    weights: tuple[float, ...] = ()
    combine: Literal["sum", "max"] = "max"
    num_queries: int = 1
    num_inner: int = 0

    @property
    def outlives(self) -> bool:
        """Whether what is remembered is worth anything to a request that comes back after a preemption."""
        return any(channel.decay > 0 for channel in self.channels)


@dataclass(frozen=True, slots=True, eq=False)
class PlaceState:
    """Tensors by place, on one device. All but the memory are for reading only.

    Attributes:
        queries: model dtype `[A, P, Q, Hq, D]`; that of the token at position i is `[:, place, i % Q]`.
        block_ids: int32 `[P, W]` logical blocks by position.
        memory: float32 `[C, G, P, W]` what each block is remembered for, never NaN; columns behind the blocks that a
            request's memory knows mean nothing.
        in_set: int8 `[G, P, W]` the sets.
    """

    queries: torch.Tensor
    block_ids: torch.Tensor
    memory: torch.Tensor
    in_set: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DueRows:
    """Requests whose memory is brought up to date together: all full blocks are known afterwards.

    Attributes:
        fields: int32 `[n, len(Due)]` on the host, where NUM_KNOWN may be negative if a memory goes on; 0 if not.
        on_device: int32 `[n, len(Due)]`, the same with NUM_KNOWN as it is.
        req_ids: vLLM's request ids.
        selections: int32 `[n]` selections each request had before, those before a preemption included.
        told: int32 `[2, n]` on the device, the same, and tokens of each prompt; 0 if nobody tells.
        is_entering: whether these requests have no set yet: the newest prompt tokens speak for all that follows.
    """

    fields: IntArray
    on_device: torch.Tensor
    req_ids: tuple[str, ...]
    selections: IntArray
    told: torch.Tensor
    is_entering: bool

    def __len__(self) -> int:
        return len(self.req_ids)

    @property
    def selections_on_device(self) -> torch.Tensor:
        """int32 `[n]` selections each request had before."""
        return self.told[0]

    @property
    def prompt_lens(self) -> torch.Tensor:
        """int32 `[n]` on the device, tokens of each prompt."""
        return self.told[1]

    @property
    def places(self) -> torch.Tensor:
        """int64 `[n]` on the device."""
        return self.on_device[:, Due.PLACE].long()

    def of_request(self, row: int) -> tuple[int, int]:
        """Place and full blocks of one of the rows."""
        return int(self.fields[row, Due.PLACE]), int(self.fields[row, Due.NUM_BLOCKS])
