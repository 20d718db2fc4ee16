"""Dense prefill over history that is not on the device: streamed from the host pool, layer by layer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from flashmemory_vllm.kinds.base import Chunk, PageKind
from flashmemory_vllm.kinds.streaming import StreamedAttention, StreamedHistory
from flashmemory_vllm.residency.batch import Batch
from flashmemory_vllm.residency.types import IntArray, Phase, Row
from flashmemory_vllm.runtime.runs import within_run
from flashmemory_vllm.runtime.uploads import upload
from flashmemory_vllm.transfer.engine import TransferEngine
from flashmemory_vllm.transfer.staging import HistoryPart, StagingRing, split_history


@dataclass(frozen=True, slots=True, eq=False)
class _StreamedRow:
    """One batch row whose history is streamed.

    Attributes:
        tokens: its rows of the batch's query, key and value tensors.
        histories: per layer group the tokens before the chunk. None where all of them are in the row's table.
    """

    tokens: slice
    histories: tuple[StreamedHistory | None, ...]


class StreamedPrefill:
    """Computes the attention of rows whose history does not lie in slots.

    The platform's pass over the batch may leave these rows out (a length of 0 in its tables): everything they
    attend to is attended to here, their own tokens included, and their part of the output is overwritten.

    Args:
        engine: moves the pages.
        kind: what they mean.
        staging: uint8 [K, staging_blocks, page_bytes] on the device, K buffers.
        poison: fill staging with NaN before each fetch. Default: False.
    """

    def __init__(
        self,
        engine: TransferEngine,
        kind: PageKind,
        staging: torch.Tensor,
        poison: bool = False,
    ) -> None:
        self._engine = engine
        self._block_size = kind.page_format.block_size
        self._ring = StagingRing(engine, staging, poison)
        self._attention = StreamedAttention(engine.layout, kind, self._ring)
        self._rows: list[_StreamedRow] = []

    @property
    def is_streaming(self) -> bool:
        """Whether a row of this step is to be completed in any layer."""
        return bool(self._rows)

    def set_rows(self, batch: Batch) -> None:
        """Learn this step's batch rows and begin to fetch.

        All layers of the step must then be completed in order, of each layer the last run of the batch first.
        """
        if not batch.prefill and not self._rows:
            return  # as in most steps; nothing was begun before, nothing is now
        streamed = [(begin, row) for begin, row in batch.begins_of_prefill() if any(map(len, row.streamed))]
        histories = self._histories([row for _, row in streamed])
        # The last row first: where a batch is computed in two runs, rows in prefill come before decode rows
        self._rows = [
            _StreamedRow(slice(begin, begin + row.num_tokens), of_groups)
            for (begin, row), of_groups in zip(streamed, histories, strict=True)
        ][::-1]
        self._ring.begin(self._schedule())

    def complete(
        self,
        layer: int,
        group: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        first_token: int = 0,
    ) -> list[slice]:
        """Overwrite the streamed rows of one layer's attention output.

        Args:
            layer: attention layer index.
            group: its layer group.
            query: [T, Hq, D], of a run of the batch's tokens.
            key: [T, Hkv, D].
            value: [T, Hkv, Dv].
            output: [T, Hq, Dv] or [T, Hq * Dv].
            first_token: where the run begins in the batch. Default: 0.

        Returns:
            Which tokens of the run those rows are.
        """
        completed = []
        for row in self._rows:
            history, tokens = row.histories[group], within_run(row.tokens, first_token, len(query))
            if history is not None and tokens is not None:
                own_query = query[tokens]
                own_output = output[tokens].view(*own_query.shape[:2], -1)
                self._attention.complete(layer, Chunk(own_query, key[tokens], value[tokens], own_output), history)
                completed.append(tokens)
        return completed

    def warm_up(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stream the null block's history once, so that no request waits for kernels to be compiled.

        Args:
            query: [T, Hq, D], what a layer would see; its own memory takes the output.
            key: [T, Hkv, D].
            value: [T, Hkv, Dv].
        """
        num_groups = len(self._engine.layout.groups)
        nothing = np.empty(0, np.int32)
        # One part is merged into the output; of three, one begins a running result and one goes on with it.
        for num_blocks in (1, 3 * self._ring.staging_blocks):
            null_blocks = np.zeros(num_blocks, np.int32)
            row = Row(
                req_id="",
                phase=Phase.PREFILL,
                num_computed_tokens=num_blocks * self._block_size,
                num_tokens=len(query),
                slots=(nothing,) * num_groups,
                positions=(nothing,) * num_groups,
                evicted_tokens=(num_blocks * self._block_size,) * num_groups,
                streamed=(null_blocks,) * num_groups,
            )
            self.set_rows(Batch.of([row], [0]))
            # The first layer of all is the first of group 0.
            self.complete(0, 0, query, key, value, query[..., : value.shape[-1]])
        self.set_rows(Batch.of([], []))

    def _schedule(self) -> Iterator[tuple[int, HistoryPart]]:
        """What the forward pass will read, in order."""
        group_of = {layer: group for group, layers in enumerate(self._engine.layout.groups) for layer in layers}
        for layer in range(self._engine.layout.num_layers):
            for row in self._rows:
                history = row.histories[group_of[layer]]
                for part in () if history is None else history.parts:
                    yield layer, part

    def _histories(self, rows: Sequence[Row]) -> list[tuple[StreamedHistory | None, ...]]:
        """Per row and layer group; all ids go to the device in one upload."""
        if not rows:
            return []
        host_ids = [ids for row in rows for ids in row.streamed]
        host_slots = [
            self._device_slots(row, slots, ids)
            for row in rows
            for slots, ids in zip(row.slots, row.streamed, strict=True)
        ]
        blocks = _split(self._engine.upload(np.concatenate(host_ids)), host_ids)
        slots = _split(upload(np.concatenate(host_slots), self._engine.layout.device), host_slots)
        return [
            tuple(self._history(row.num_computed_tokens, next(blocks), ids, next(slots)) for ids in row.streamed)
            for row in rows
        ]

    def _history(
        self, num_tokens: int, blocks: torch.Tensor, host_blocks: IntArray, device_slots: torch.Tensor
    ) -> StreamedHistory | None:
        if not len(host_blocks):
            return None
        parts = split_history(blocks, host_blocks, self._ring.staging_blocks)
        return StreamedHistory(num_tokens, parts, device_slots, self._block_size)

    def _device_slots(self, row: Row, slots: IntArray, streamed: IntArray) -> IntArray:
        """Slots of the history that the host does not have."""
        num_history_blocks = -(-row.num_computed_tokens // self._block_size)  # a partial one included
        return slots[: num_history_blocks - len(streamed)]


def _split(joined: torch.Tensor, like: Sequence[IntArray]) -> Iterator[torch.Tensor]:
    """Take a concatenation apart again."""
    bounds = np.cumsum([0, *map(len, like)]).tolist()
    return (joined[start:end] for start, end in pairwise(bounds))
