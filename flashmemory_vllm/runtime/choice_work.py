"""A step's choice: what the device is asked, and the list that is on its way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from flashmemory_kernels.common.due_rows import Due

from flashmemory_vllm.indexer.places import DueRows
from flashmemory_vllm.indexer.shares import TILE
from flashmemory_vllm.residency.asked import Ask, Asked
from flashmemory_vllm.residency.types import IntArray
from flashmemory_vllm.runtime.choice import ChoiceSizes
from flashmemory_vllm.runtime.long_list import from_long_list
from flashmemory_vllm.runtime.side_stream import Arrival
from flashmemory_vllm.runtime.uploads import UploadRing

# Of each row: the fields, selections before, tokens of the prompt
NUM_UPLOADED = len(Due) + 2


@dataclass(frozen=True, slots=True, eq=False)
class ChoiceWork:
    """What a step chooses.

    Attributes:
        asked: the rows, those without a set first, of both kinds those that are scored first.
        fields: int32 `[n, len(Due)]` of them.
        selections: int32 `[n]` that they had before.
        questions: of each row without a set, queries `[q, A, Hq, D]` of its question.
        long_size: elements of the long list.
        scored: the rows that are scored: without a set, and with one.
        packed: what is uploaded, if the fields lie in it already and are complete. Default: None, it is to be made.
    """

    asked: Asked
    fields: IntArray
    selections: IntArray
    questions: Sequence[torch.Tensor | None]
    long_size: int
    scored: tuple[slice, slice]
    packed: IntArray | None = None

    @property
    def num_new(self) -> int:
        """Rows without a set."""
        return len(self.questions)

    @property
    def unscored(self) -> tuple[slice, slice]:
        """All others, likewise."""
        new, others = self.scored
        return slice(new.stop, self.num_new), slice(others.stop, len(self.fields))

    def _fill_tiles(self) -> None:
        """Say where the log-masses of each row begin, among those that are scored together: see `fill_first_tiles`."""
        for part in self.scored:
            tiles = -(-self.fields[part, Due.NUM_BLOCKS] // TILE)
            self.fields[part, Due.FIRST_TILE] = np.cumsum(tiles) - tiles

    def upload(self, ring: UploadRing) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy on the device, in one piece: the fields, and what selectors are told beside them.

        Args:
            ring: takes `NUM_UPLOADED` elements for each row.

        Returns:
            Int32 `[n, len(Due)]`, and `[2, n]` of selections before and tokens of the prompts; until the next call.
        """
        given = self.packed
        if given is None:
            self._fill_tiles()
            told = (self.selections, self.asked.fields[:, Ask.PROMPT_LEN])
            given = np.concatenate((self.fields.reshape(-1), *told))
        packed = ring.upload(given)
        return packed[: self.fields.size].view(self.fields.shape), packed[self.fields.size :].view(2, -1)

    def due(self, on_device: torch.Tensor, told: torch.Tensor) -> Iterator[tuple[slice, DueRows]]:
        """The rows to score, those without a set apart from the others, and where they stand.

        Args:
            on_device: int32 `[n, len(Due)]` all rows, looked up.
            told: int32 `[2, n]` on the device.
        """
        for part in self.scored:
            if part.start < part.stop:
                due = DueRows(
                    self.fields[part],
                    on_device[part],
                    self.asked.req_ids[part],
                    self.selections[part],
                    told[:, part],
                    part.start == 0 and self.num_new > 0,
                )
                yield part, due


@dataclass(frozen=True, slots=True, eq=False)
class PendingList:
    """A list on its way: rows that are in force at once, those without a set first, then all others.

    Attributes:
        step: whose list it is.
        asked: its rows.
        num_at_once: how many of them are in force in the next step.
        fields: int32 `[n, len(Due)]`, as the device was asked.
        arrival: what `ChoiceState.choose` returns, and the long list behind it.
        asked_at: when; seconds of a monotonic clock.
        is_begun: the rows that are in force at once were read.
    """

    step: int
    asked: Asked
    num_at_once: int
    fields: IntArray
    arrival: Arrival
    asked_at: float
    is_begun: bool = False

    @property
    def at_once(self) -> slice:
        """The rows that are in force in the next step."""
        return slice(self.num_at_once)

    @property
    def later(self) -> slice:
        """All others."""
        return slice(self.num_at_once, len(self.asked))

    def read(self, out: IntArray, part: slice, sizes: ChoiceSizes) -> tuple[IntArray, IntArray]:
        """A part of the list, int32 `[n, G, 6 + 2 L]`, and int32 `[n]` which of its rows have failed.

        Args:
            out: all that has arrived.
            part: which rows.
            sizes: of lists.
        """
        num_rows = len(self.asked)
        end = num_rows * (1 + sizes.num_groups * sizes.columns)
        listed = out[num_rows:end].reshape(num_rows, sizes.num_groups, sizes.columns)[part]
        if part == self.at_once:
            listed = from_long_list(self.fields[part], listed, out[end:])
        return listed, out[:num_rows][part]
