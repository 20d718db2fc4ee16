"""How many slots a request may hold.

The planner spends what the scheduler's ledger (`residency/ledger.py`) has reserved. Both follow one policy, so that
a step that was admitted always fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.residency.types import IntArray

# Steps from the one whose queries choose a set to the first one that reads it
STEPS_TO_FORCE = 2
# More tokens than any request has
FOR_EVER = 1 << 30


def cdiv(numerator: int, denominator: int) -> int:
    """Divide and round up."""
    return -(-numerator // denominator)


class Frames(NamedTuple):
    """Budgets of decode rows, and blocks that are always in their sets; int32 `[n]` each.

    Attributes:
        budget: slots.
        sink: first blocks.
        recent: newest blocks, the one being written included.
    """

    budget: IntArray
    sink: IntArray
    recent: IntArray


Mode: TypeAlias = Literal["always", "pressure"]


@dataclass(frozen=True, slots=True)
class BudgetPolicy:
    """Slots of one request in one layer group; filled from the configuration, shared by scheduler and worker.

    Attributes:
        block_size: tokens in a block.
        resident_ratio: resident blocks over all blocks of a sparse request, in (0, 1]; 1 keeps every request
            dense.
        min_sparse_tokens: shorter requests are dense, all their blocks stay resident.
        sink_tokens: tokens at the start of a request that always stay resident.
        recent_tokens: newest tokens that always stay resident, as far as a quarter of the budget goes.
        max_num_batched_tokens: most tokens of one step.
        max_model_len: most tokens of one request.
        growth_reserve_tokens: growth that a request has slots reserved for.
        mode: whether requests are sparse `always`, or only under `pressure`; see `residency/modes.py`.

    Raises:
        ConfigError: a value is outside of its range.
    """

    block_size: int
    resident_ratio: float
    min_sparse_tokens: int
    sink_tokens: int
    recent_tokens: int
    max_num_batched_tokens: int
    max_model_len: int
    growth_reserve_tokens: int
    mode: Mode = "always"

    def __post_init__(self) -> None:
        if not 0.0 < self.resident_ratio <= 1.0:
            raise ConfigError(f"resident_ratio: {self.resident_ratio} is given, above 0 and at most 1 is allowed")
        for name, smallest in (
            ("block_size", 1),
            ("min_sparse_tokens", 0),
            ("sink_tokens", 0),
            ("recent_tokens", 0),
            ("max_num_batched_tokens", 1),
            ("max_model_len", 1),
            ("growth_reserve_tokens", 0),
        ):
            given = getattr(self, name)
            if given < smallest:
                raise ConfigError(f"{name}: {given} is given, at least {smallest} is allowed")

    def is_dense(self, num_tokens: int) -> bool:
        """Whether a request of this length keeps all its blocks because of its length or the ratio."""
        return self.resident_ratio == 1.0 or num_tokens < self.min_sparse_tokens

    def decode_budget(self, num_tokens: int) -> int:
        """Slots of a decode row with `num_tokens` tokens after its step.

        A sparse request keeps room for the sink, for two blocks that one step may write, and grows by at most
        one slot a block. The budget therefore never shrinks with length, but for the one drop where a request
        turns sparse.
        """
        num_blocks = -(-num_tokens // self.block_size)
        if self.is_dense(num_tokens):
            return num_blocks
        return min(num_blocks, max(floor(self.resident_ratio * num_blocks), self._num_sink_blocks + 2))

    def most_held(self, num_tokens: int) -> int:
        """Most slots of a decode row: its budget, and the blocks for which no other has gone yet.

        A row takes a slot for a block that it begins; the choice at the end of that step says who goes for it, two
        steps later.
        """
        budget, num_blocks = self.decode_budget(num_tokens), cdiv(num_tokens, self.block_size)
        return min(num_blocks, budget + cdiv(STEPS_TO_FORCE + 1, self.block_size))

    def keeps_all(self, num_tokens: int) -> bool:
        """Whether the budget covers every block, so that there is nothing to select."""
        return self.decode_budget(num_tokens) == cdiv(num_tokens, self.block_size)

    def sink_blocks(self, num_tokens: int) -> int:
        """First blocks that are always in the resident set."""
        return min(self._num_sink_blocks, cdiv(num_tokens, self.block_size))

    def recent_blocks(self, num_tokens: int) -> int:
        """Newest blocks, the one being written included, that are always in the resident set.

        At most a quarter of the budget, but two where there is room: a block that was just begun holds nothing of
        the question. Never so many that sink and recent leave no block to choose; at least one.
        """
        budget = self.decode_budget(num_tokens)
        wanted = cdiv(self.recent_tokens, self.block_size)
        return max(1, min(wanted, max(2, budget // 4), budget - self.sink_blocks(num_tokens) - 1))

    def keeps_all_until(self, num_tokens: int) -> int:
        """Of a request that keeps all its blocks: up to how many tokens it does so at least."""
        if self.resident_ratio == 1.0:
            return FOR_EVER
        if num_tokens < self.min_sparse_tokens:
            return self.min_sparse_tokens - 1
        return cdiv(num_tokens, self.block_size) * self.block_size

    def frames(self, num_tokens: IntArray) -> Frames:
        """`decode_budget`, `sink_blocks` and `recent_blocks` of many lengths at once, int32 `[n]`."""
        num_blocks, num_sink = -(-num_tokens // self.block_size), self._num_sink_blocks
        sparse = np.maximum(np.floor(self.resident_ratio * num_blocks).astype(np.int32), num_sink + 2)
        is_dense = num_tokens < (FOR_EVER if self.resident_ratio == 1.0 else self.min_sparse_tokens)
        budget = np.where(is_dense, num_blocks, np.minimum(num_blocks, sparse))
        sink = np.minimum(num_sink, num_blocks)
        most = np.minimum(np.maximum(2, budget // 4), budget - sink - 1)
        recent = np.maximum(1, np.minimum(cdiv(self.recent_tokens, self.block_size), most))
        return Frames(budget, sink, recent)

    def need(self, num_tokens: int, prefill_end: int) -> int:
        """Slots that the planner may use for a request in a step.

        Args:
            num_tokens: tokens of the request after the step that is being scheduled.
            prefill_end: tokens that dense prefill computes; the request decodes once `num_tokens` is above.
        """
        return self._slots_until(num_tokens, prefill_end, growth_tokens=0)

    def reserve(self, num_tokens: int, prefill_end: int) -> int:
        """Slots to reserve for a request: what it needs now and until it has grown by the reserve.

        Args:
            num_tokens: as for `need`, like `prefill_end`.
            prefill_end: see there.
        """
        return self._slots_until(num_tokens, prefill_end, self.growth_reserve_tokens)

    def same_until(self, num_tokens: int) -> int:
        """Of a request that decodes: up to how many tokens `need` and `reserve` say the same at least."""
        size, growth = self.block_size, self.growth_reserve_tokens
        until = min(cdiv(num_tokens, size) * size, cdiv(num_tokens + growth, size) * size - growth)
        # Where it turns sparse, and where what is reserved for it does
        for ahead in (0, growth):
            if num_tokens + ahead < self.min_sparse_tokens:
                until = min(until, self.min_sparse_tokens - 1 - ahead)
        return until

    def worst_case(self) -> int:
        """The largest reserve of any request that is not longer than `max_model_len`."""
        return max(self._largest_decode_budget(1, self.max_model_len), self._largest_chunk(self.max_model_len))

    def _slots_until(self, num_tokens: int, prefill_end: int, growth_tokens: int) -> int:
        tokens_now = max(num_tokens, prefill_end)
        tokens_later = max(tokens_now, min(tokens_now + growth_tokens, self.max_model_len))
        decode = self._largest_decode_budget(tokens_now, tokens_later)
        return decode if num_tokens > prefill_end else max(decode, self._largest_chunk(tokens_later))

    @property
    def _num_sink_blocks(self) -> int:
        return cdiv(self.sink_tokens, self.block_size)

    def _largest_decode_budget(self, shortest: int, longest: int) -> int:
        """Largest decode budget over a range of lengths: at its end, or at the last dense length in it."""
        last_dense = min(longest, self.min_sparse_tokens - 1)
        at_end = self.most_held(longest)
        return max(at_end, self.most_held(last_dense)) if last_dense >= shortest else at_end

    def _largest_chunk(self, num_tokens: int) -> int:
        """Most blocks that one prefill step writes; a chunk may begin and end within a block."""
        return min(cdiv(num_tokens, self.block_size), cdiv(self.max_num_batched_tokens, self.block_size) + 1)
