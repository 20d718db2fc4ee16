"""Dense prefill over history that is not on the device: streamed from the host pool, layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flashmemory_vllm.residency.types import IntArray, Row
from flashmemory_vllm.transfer.engine import TransferEngine
from flashmemory_vllm.transfer.page_format import PageFormat
from flashmemory_vllm.transfer.streaming import PagedHistory, PartialAttention, stream_attention


@dataclass(frozen=True, slots=True, eq=False)
class _StreamedRow:
    """One batch row whose history is streamed.

    Attributes:
        tokens: its rows of the batch's query, key and value tensors.
        num_history_tokens: tokens before the chunk.
        block_ids: per layer group int64 [n] on the device, history blocks to read from the host.
        device_slots: per layer group int64 [m] on the device, slots of the history that the host does not have.
    """

    tokens: slice
    num_history_tokens: int
    block_ids: tuple[torch.Tensor, ...]
    device_slots: tuple[torch.Tensor, ...]


class _PoisonedHistory(PagedHistory):
    """History that leaves NaN in staging wherever nothing was fetched."""

    def fetch(self, start: int, count: int, out: torch.Tensor) -> None:
        """As the other's, into pages that hold nothing else."""
        out.fill_(torch.nan)
        super().fetch(start, count, out)


class StreamedPrefill:
    """Completes the attention of rows whose history does not lie in slots.

    Args:
        engine: moves the pages.
        page_format: what lies inside a page.
        staging: two buffers [n, page_elems] on the device.
        scale: factor on `q . k`.
        attend: attention over a part of the keys.
        poison: fill staging with NaN before each fetch. Default: False.
    """

    def __init__(
        self,
        engine: TransferEngine,
        page_format: PageFormat,
        staging: tuple[torch.Tensor, torch.Tensor],
        scale: float,
        attend: PartialAttention,
        poison: bool = False,
    ) -> None:
        self._engine = engine
        self._page_format = page_format
        self._staging = staging
        self._scale = scale
        self._attend = attend
        self._history_cls = _PoisonedHistory if poison else PagedHistory
        self._rows: list[_StreamedRow] = []

    def set_rows(self, rows: Sequence[Row]) -> None:
        """Learn this step's batch rows; a step without streamed rows costs nothing afterwards."""
        bounds = np.cumsum([0, *(row.num_tokens for row in rows)])
        self._rows = [
            self._streamed(row, slice(int(bounds[index]), int(bounds[index + 1])))
            for index, row in enumerate(rows)
            if any(len(ids) for ids in row.streamed)
        ]

    def complete(
        self,
        layer: int,
        group: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Overwrite the streamed rows of one layer's attention output.

        Args:
            layer: attention layer index.
            group: its layer group.
            query: [T, Hq, D].
            key: [T, Hkv, D].
            value: [T, Hkv, D].
            output: [T, Hq, D] or [T, Hq * D].
        """
        for row in self._rows:
            history = self._history_cls(
                self._engine,
                self._page_format,
                layer,
                row.block_ids[group],
                row.num_history_tokens,
                row.device_slots[group],
            )
            chunk = query[row.tokens]
            attended = stream_attention(
                chunk, key[row.tokens], value[row.tokens], history, self._scale, self._staging, self._attend
            )
            output[row.tokens].view_as(chunk).copy_(attended)

    def _streamed(self, row: Row, tokens: slice) -> _StreamedRow:
        block_size = self._page_format.block_size
        num_history_blocks = -(-row.num_computed_tokens // block_size)  # a partial one included
        return _StreamedRow(
            tokens=tokens,
            num_history_tokens=row.num_computed_tokens,
            block_ids=tuple(self._to_device(ids) for ids in row.streamed),
            device_slots=tuple(
                self._to_device(slots[: num_history_blocks - len(ids)])
                for slots, ids in zip(row.slots, row.streamed, strict=True)
            ),
        )

    def _to_device(self, ids: IntArray) -> torch.Tensor:
        return torch.from_numpy(ids.astype(np.int64)).to(self._staging[0].device)
