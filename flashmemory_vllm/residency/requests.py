"""What the planner remembers of a request, and of a request that is scheduled in the step being planned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.budget import cdiv
from flashmemory_vllm.residency.types import NOTHING, FloatArray, IntArray, Phase

NO_SCORES: FloatArray = np.empty(0, np.float32)


class BlockList:
    """A request's logical blocks by position; appending is cheap, reading gives views."""

    def __init__(self) -> None:
        self._ids: IntArray = np.empty(16, np.int32)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def ids(self) -> IntArray:
        """int32 `[num_blocks]` logical blocks."""
        return self._ids[: self._size]

    def extend(self, ids: Iterable[int]) -> None:
        """Append logical blocks."""
        added = np.fromiter(ids, np.int32)
        size = self._size + added.size
        if size > self._ids.size:
            grown = np.empty(max(size, 2 * self._ids.size), np.int32)
            grown[: self._size] = self.ids
            self._ids = grown
        self._ids[self._size : size] = added
        self._size = size


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """The compacted block table of a row, in the terms of `Row`."""

    slots: tuple[IntArray, ...]
    positions: tuple[IntArray, ...]
    evicted_tokens: tuple[int, ...]
    streamed: tuple[IntArray, ...]
    num_blocks: int


@dataclass(slots=True, eq=False)
class RequestState:
    """A known request. All positions are per group, sorted, and int32.

    A decode row reads `held` without `landing`, and `leaving` in place of what is still landing:

        held     the resident set: pinned. Prefill rows that stream hold only what they write.
        landing  the part of `held` that this step's prefetches bring; in force at the next plan.
        leaving  blocks of the set before a selection that fill in for `landing`; not pinned.

    Attributes:
        req_id: vLLM's request id.
        prefill_len: tokens that dense prefill computes.
        num_tokens: tokens that have KV after the last planned step.
        blocks: logical blocks, those without tokens yet at the end.
        offered: scores of a selection that is not yet in force, `[G, n]`.
        scores: scores of the selection in force, `[G, n]`.
        is_decoding: a decode row was planned.
        kept_all: the budget of the last decode row covered all blocks; true before the first.
        steps_since_due: decode steps since the request was last due.
        table: table of the last decode row, None if the next one differs in any case.
        budget: decode budget that `table` was made for.
    """

    req_id: str
    prefill_len: int
    num_tokens: int
    blocks: BlockList
    held: list[IntArray]
    landing: list[IntArray]
    leaving: list[IntArray]
    offered: FloatArray | None = None
    scores: FloatArray | None = None
    is_decoding: bool = False
    kept_all: bool = True
    steps_since_due: int = 0
    table: Table | None = None
    budget: int = 0

    @classmethod
    def begin(cls, req_id: str, prefill_len: int, num_computed_tokens: int, num_groups: int) -> RequestState:
        """A request that holds nothing yet."""
        nothing = [NOTHING] * num_groups
        blocks = BlockList()
        return cls(req_id, prefill_len, num_computed_tokens, blocks, nothing, nothing.copy(), nothing.copy())

    def scores_of(self, group: int) -> FloatArray:
        """Scores in force by position, empty if there never was a selection."""
        return NO_SCORES if self.scores is None else self.scores[group]


@dataclass(slots=True, eq=False)
class ScheduledRequest:
    """A request in the step being planned; computes `num_tokens` after `num_computed_tokens`.

    Its blocks by position: history is `[0, first_written)`, all full; `[first_written, end)` are written, of
    which `[first_fresh, end)` hold no token before the step; `[0, num_full)` are full after it.
    """

    state: RequestState
    num_computed_tokens: int
    num_tokens: int
    block_size: int
    phase: Phase = field(init=False)
    first_written: int = field(init=False)
    first_fresh: int = field(init=False)
    num_full: int = field(init=False)
    end: int = field(init=False)

    def __post_init__(self) -> None:
        computed, after = self.num_computed_tokens, self.num_tokens_after
        self.phase = Phase.PREFILL if computed < self.state.prefill_len else Phase.DECODE
        self.first_written = computed // self.block_size
        self.first_fresh = cdiv(computed, self.block_size)
        self.num_full = after // self.block_size
        self.end = cdiv(after, self.block_size)
        if self.num_tokens < 1 or self.end > len(self.state.blocks):
            raise IntegrityError(
                f"request {self.state.req_id}: {computed} + {self.num_tokens} tokens do not fit "
                f"its {len(self.state.blocks)} blocks of {self.block_size}, or none are scheduled"
            )

    @property
    def num_tokens_after(self) -> int:
        """Tokens that have KV after the step."""
        return self.num_computed_tokens + self.num_tokens

    @property
    def history(self) -> IntArray:
        """Logical blocks that are full before the step."""
        return self.state.blocks.ids[: self.first_written]

    @property
    def fresh(self) -> IntArray:
        """Logical blocks whose first tokens are written in the step."""
        return self.state.blocks.ids[self.first_fresh : self.end]
