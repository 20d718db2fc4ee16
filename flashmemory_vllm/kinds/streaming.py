"""Dense prefill attention over a history that is not on the device: streamed in, merged by log-sum-exp."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from flashmemory_kernels.merge_attention import merge_attention

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.kinds.base import Chunk, PageKind, Part
from flashmemory_vllm.transfer.layout import PageLayout
from flashmemory_vllm.transfer.staging import HistoryPart, StagingRing


@dataclass(frozen=True, slots=True, eq=False)
class StreamedHistory:
    """The earlier tokens of a chunk: blocks from the host, then blocks from their device slots.

    Attributes:
        num_tokens: tokens of host and device blocks together.
        parts: full blocks to read from the host.
        device_slots: int32 [m] on the device, slots of the blocks without a host copy: full ones that another
            row writes in this step, and last the partial tail.
        block_size: tokens in a block.

    Raises:
        IntegrityError: the blocks do not hold `num_tokens`, or the partial tail would come from the host.
    """

    num_tokens: int
    parts: tuple[HistoryPart, ...]
    device_slots: torch.Tensor
    block_size: int

    def __post_init__(self) -> None:
        """Refuse a history whose pages do not hold its tokens."""
        num_device, num_tokens = len(self.device_slots), self.num_device_tokens
        if num_tokens < 0 or -(-num_tokens // self.block_size) != num_device:
            num_full, num_tail = divmod(self.num_tokens, self.block_size)
            num_host = sum(len(part.host_blocks) for part in self.parts)
            raise IntegrityError(
                f"a history of {self.num_tokens} tokens has {num_full} full blocks of {self.block_size} and "
                f"{num_tail} more tokens, which are on the device; got {num_host} host and {num_device} "
                "device blocks"
            )

    @property
    def num_device_tokens(self) -> int:
        """Tokens that are not streamed."""
        return self.num_tokens - sum(len(part.host_blocks) for part in self.parts) * self.block_size


class StreamedAttention:
    """Attends prefill chunks to themselves (causal) and to all earlier tokens of their requests.

    The parts are the chunk itself, the blocks on the device, and the streamed ones, read where they lie and
    merged by their log-sum-exp: dense attention, exact up to rounding. The first part is the running result as
    it is, the merges between write float32 in place, the last one writes the output. A sink is of the first part.

    Args:
        layout: where pages lie.
        kind: what they mean.
        ring: fetches the streamed parts.
    """

    def __init__(self, layout: PageLayout, kind: PageKind, ring: StagingRing) -> None:
        self._layout = layout
        self._kind = kind
        self._ring = ring

    def complete(self, layer: int, chunk: Chunk, history: StreamedHistory) -> None:
        """Compute one chunk's attention in one layer; `history.parts` are what the ring has next.

        Args:
            layer: attention layer.
            chunk: its tokens; `chunk.output` is written.
            history: the earlier tokens.
        """
        parts = self._parts(layer, chunk, history)
        num_parts = 1 + (history.num_device_tokens > 0) + len(history.parts)
        if num_parts == 1:
            chunk.output.copy_(next(parts)[0])
            return
        total, total_lse = next(parts)
        for index in range(num_parts - 2):
            part, part_lse = next(parts)
            # Each merge rounds once: between the merges the result stays in float32.
            target = torch.empty_like(total, dtype=torch.float32) if index == 0 else total
            total, total_lse = merge_attention(total, total_lse, part, part_lse, target, total_lse)
        part, part_lse = next(parts)
        merge_attention(total, total_lse, part, part_lse, chunk.output, total_lse)

    def _parts(self, layer: int, chunk: Chunk, history: StreamedHistory) -> Iterator[Part]:
        yield self._kind.over_itself(layer, chunk)
        if history.num_device_tokens:
            cache = self._layout.cache(layer)
            yield self._kind.over_slots(chunk.query, cache, history.device_slots, history.num_device_tokens)
        for part in history.parts:
            with self._ring.part(layer, part) as staged:
                attended = self._kind.over_pages(chunk.query, self._layout.unflatten(layer, staged))
            yield attended
