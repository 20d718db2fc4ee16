"""What the planner remembers of a request, and of a request that is scheduled in the step being planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress

import numpy as np

from flashmemory_vllm.residency.budget import BudgetPolicy, cdiv
from flashmemory_vllm.residency.lists import FirstSet
from flashmemory_vllm.residency.types import NOTHING, BoolArray, IntArray, NewRequest, Phase


class BlockList:
    """A request's logical blocks by position; appending is cheap, reading gives views.

    Attributes:
        size: how many there are.
    """

    def __init__(self) -> None:
        self._ids: IntArray = np.empty(16, np.int32)
        self.size = 0

    @property
    def ids(self) -> IntArray:
        """int32 `[num_blocks]` logical blocks."""
        return self._ids[: self.size]

    def extend(self, ids: Sequence[int]) -> None:
        """Append logical blocks."""
        size = self.size + len(ids)
        if size > self._ids.size:
            grown = np.empty(max(size, 2 * self._ids.size), np.int32)
            grown[: self.size] = self.ids
            self._ids = grown
        self._ids[self.size : size] = ids
        self.size = size


@dataclass(slots=True, eq=False)
class RequestState:
    """A known request.

    Attributes:
        req_id: vLLM's request id.
        policy: slots it may hold; decided when it is scheduled for the first time.
        prefill_len: tokens that dense prefill computes.
        prompt_len: those of them that the request came with.
        num_tokens: tokens that have KV after the last planned step.
        blocks: logical blocks, those without tokens yet at the end.
        place: where its tables lie while it decodes.
        held: per group int32 `[k]`, ascending positions of the blocks that it holds in prefill; nothing in decode.
        first_set: that one, once it is known and until it is in force.
        has_set: it is in force, or one after it.
        is_decoding: a decode row was planned.
        num_selections: that `residency/fallback.py` was told of.
        selection: running number of the last of them, over all requests.
        falls_back: it keeps all its blocks, though its budget does not; see `residency/fallback.py`.
        was_revoked: it fell back before, and had to give up.
        num_worth: blocks that its selections found worth a slot, of those that they could do without.
        num_evictable: all that they could do without.
    """

    req_id: str
    policy: BudgetPolicy
    prefill_len: int
    prompt_len: int
    num_tokens: int
    blocks: BlockList
    place: int
    held: list[IntArray]
    first_set: FirstSet | None = None
    has_set: bool = False
    is_decoding: bool = False
    num_selections: int = 0
    selection: int = 0
    falls_back: bool = False
    was_revoked: bool = False
    num_worth: int = 0
    num_evictable: int = 0

    @classmethod
    def begin(cls, new: NewRequest, policy: BudgetPolicy, num_groups: int, place: int) -> RequestState:
        """A request that holds nothing yet."""
        prompt_len = new.prefill_len if new.prompt_len is None else new.prompt_len
        held = [NOTHING] * num_groups
        return cls(new.req_id, policy, new.prefill_len, prompt_len, new.num_computed_tokens, BlockList(), place, held)

    @property
    def selected_share(self) -> float:
        """Share of the blocks that were worth a slot, over all selections; 0 before the first."""
        return self.num_worth / self.num_evictable if self.num_evictable else 0.0

    @property
    def budget_slots(self) -> int:
        """Slots of a group that are its own in the last planned step, whatever others do."""
        return self.policy.need(self.num_tokens, self.prefill_len)

    @property
    def extra_blocks(self) -> int:
        """Slots of a group that it may hold beside its own, because it falls back."""
        if not self.falls_back:
            return 0
        return cdiv(self.num_tokens, self.policy.block_size) - self.policy.most_held(self.num_tokens)


@dataclass(slots=True, eq=False)
class ScheduledRequest:
    """A request in the step being planned; computes `num_tokens` after `num_computed_tokens`.

    Its blocks by position: history is `[0, first_written)`, all full; `[first_written, end)` are written, of
    which `[first_fresh, end)` hold no token before the step. It has `num_tokens_after` tokens with KV after it.
    """

    state: RequestState
    num_computed_tokens: int
    num_tokens: int
    block_size: int
    num_tokens_after: int = field(init=False)
    phase: Phase = field(init=False)
    first_written: int = field(init=False)
    first_fresh: int = field(init=False)
    end: int = field(init=False)

    def __post_init__(self) -> None:
        computed, block_size = self.num_computed_tokens, self.block_size
        self.num_tokens_after = after = computed + self.num_tokens
        self.phase = Phase.PREFILL if computed < self.state.prefill_len else Phase.DECODE
        self.first_written = computed // block_size
        self.first_fresh = -(-computed // block_size)
        self.end = -(-after // block_size)

    @property
    def history(self) -> IntArray:
        """Logical blocks that are full before the step."""
        return self.state.blocks.ids[: self.first_written]

    @property
    def fresh(self) -> IntArray:
        """Logical blocks whose first tokens are written in the step."""
        return self.state.blocks.ids[self.first_fresh : self.end]


@dataclass(slots=True, eq=False)
class ScheduledRows:
    """Requests in the step being planned, as arrays int32 `[n]` whose names are those of `ScheduledRequest`.

    What decode rows need in every step is done with these; `row` makes one that is dealt with by itself. The blocks
    `[0, num_full)` of each are full after the step.
    """

    states: Sequence[RequestState]
    place: IntArray
    num_computed_tokens: IntArray
    num_tokens: IntArray
    is_prefill: BoolArray
    block_size: int
    num_tokens_after: IntArray = field(init=False)
    first_written: IntArray = field(init=False)
    first_fresh: IntArray = field(init=False)
    num_full: IntArray = field(init=False)
    end: IntArray = field(init=False)

    def __post_init__(self) -> None:
        computed, block_size = self.num_computed_tokens, self.block_size
        self.num_tokens_after = after = computed + self.num_tokens
        self.first_written = computed // block_size
        self.first_fresh = -(-computed // block_size)
        self.num_full = after // block_size
        self.end = -(-after // block_size)

    @classmethod
    def none(cls, block_size: int) -> ScheduledRows:
        """Of no request."""
        return cls([], NOTHING.copy(), NOTHING.copy(), NOTHING.copy(), np.zeros(0, np.bool_), block_size)

    def __len__(self) -> int:
        return len(self.states)

    def take(self, rows: BoolArray) -> ScheduledRows:
        """Some of them, by a mask."""
        return ScheduledRows(
            list(compress(self.states, rows.tolist())),
            self.place[rows],
            self.num_computed_tokens[rows],
            self.num_tokens[rows],
            self.is_prefill[rows],
            self.block_size,
        )

    def row(self, index: int) -> ScheduledRequest:
        """One of them."""
        computed, num_tokens = int(self.num_computed_tokens[index]), int(self.num_tokens[index])
        return ScheduledRequest(self.states[index], computed, num_tokens, self.block_size)

    def rows_of(self, mask: BoolArray) -> list[ScheduledRequest]:
        """Some of them, by a mask, each by itself."""
        return [self.row(index) for index in np.flatnonzero(mask).tolist()]
