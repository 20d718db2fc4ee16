"""The rows that are chosen for at the end of a step, all together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from flashmemory_vllm.residency.types import BoolArray, IntArray


class AskedRow(NamedTuple):
    """A row that is chosen for after the step. Positions are of blocks within its request.

    Attributes:
        req_id: vLLM's request id.
        place: where its tables lie.
        epoch: which tenant of the place it is.
        num_tokens: tokens with KV after the step.
        prompt_len: tokens of its prompt.
        num_full: its full blocks.
        sink_end: end of the sink.
        first_recent: first of the newest blocks that are always in the set.
        end: blocks of the request, the one being written included.
        want: how many are to be chosen.
        cap: how many of them may be new in the set, if its list is not in force at once.
        is_new: it has no set yet.
        is_scored: its blocks are scored; otherwise what is known of them counts.
        at_once: its list is in force in the next step, with as many new blocks as it likes; so is that of a new one.
    """

    req_id: str
    place: int
    epoch: int
    num_tokens: int
    prompt_len: int
    num_full: int
    sink_end: int
    first_recent: int
    end: int
    want: int
    cap: int
    is_new: bool = False
    is_scored: bool = True
    at_once: bool = False


class Ask(IntEnum):
    """Columns of `Asked.fields`: what `AskedRow` has beside the name, in its order."""

    PLACE = 0
    EPOCH = 1
    NUM_TOKENS = 2
    PROMPT_LEN = 3
    NUM_FULL = 4
    SINK_END = 5
    FIRST_RECENT = 6
    END = 7
    WANT = 8
    CAP = 9
    IS_NEW = 10
    IS_SCORED = 11
    AT_ONCE = 12


@dataclass(frozen=True, slots=True, eq=False)
class Asked(Sequence[AskedRow]):
    """All rows that are chosen for after a step; filled by the planner. A sequence of `AskedRow`.

    Attributes:
        req_ids: vLLM's request ids.
        fields: int32 `[n, len(Ask)]`.
        block_ids: int32 `[P, W]` logical blocks of each place by position; live, so to be read in the step only.
    """

    req_ids: tuple[str, ...]
    fields: IntArray
    block_ids: IntArray

    @classmethod
    def of(cls, rows: Sequence[AskedRow], block_ids: IntArray) -> Asked:
        """These rows."""
        fields = np.array([row[1:] for row in rows], np.int32).reshape(len(rows), len(Ask))
        return cls(tuple(row.req_id for row in rows), fields, block_ids)

    def __len__(self) -> int:
        return len(self.req_ids)

    def __getitem__(self, index: int) -> AskedRow:  # type: ignore[override]
        numbers = self.fields[index].tolist()
        return AskedRow(self.req_ids[index], *numbers[: Ask.IS_NEW], *map(bool, numbers[Ask.IS_NEW :]))

    def __iter__(self) -> Iterator[AskedRow]:
        return map(self.__getitem__, range(len(self)))

    def take(self, rows: IntArray | slice) -> Asked:
        """Some of the rows, in the order given."""
        names = self.req_ids[rows] if isinstance(rows, slice) else tuple(self.req_ids[row] for row in rows.tolist())
        return Asked(names, self.fields[rows], self.block_ids)

    @property
    def place(self) -> IntArray:
        """Places int32 `[n]`, a view."""
        return self.fields[:, Ask.PLACE]

    @property
    def epoch(self) -> IntArray:
        """Tenants int32 `[n]`, a view."""
        return self.fields[:, Ask.EPOCH]

    @property
    def is_new(self) -> BoolArray:
        """Which have no set yet, bool `[n]`."""
        return self.fields[:, Ask.IS_NEW] > 0

    @property
    def is_scored(self) -> BoolArray:
        """Whose blocks are scored, bool `[n]`."""
        return self.fields[:, Ask.IS_SCORED] > 0

    @property
    def at_once(self) -> BoolArray:
        """Whose lists are in force in the next step, bool `[n]`."""
        return self.fields[:, Ask.AT_ONCE] > 0

    @property
    def num_candidates(self) -> IntArray:
        """Blocks of each that may be chosen or left, int32 `[n]`."""
        return self.fields[:, Ask.FIRST_RECENT] - self.fields[:, Ask.SINK_END]

    def blocks_of(self, row: int) -> IntArray:
        """Logical blocks of a row that are full, int32 `[num_full]`, a view."""
        place, num_full = self.fields[row, Ask.PLACE], self.fields[row, Ask.NUM_FULL]
        return self.block_ids[place, :num_full]
