"""The resident set of one request in one layer group, and how it changes block by block."""

from __future__ import annotations

import numpy as np

from flashmemory_vllm.residency.ranking import best, merged, ranks_of, replaced, without, worst_to_best
from flashmemory_vllm.residency.types import NO_SCORES, NOTHING, FloatArray, IntArray


class ResidentSet:
    """What a request holds, awaits and gives up in a group. Positions are int32, ascending but for `waiting`.

    A decode row reads `held`, and `leaving` in place of what is not there yet:

        waiting  chosen, without a claim on a slot yet: granted in portions over the next steps, best first
        held     pinned, all with a slot. Prefill rows that stream hold only what they write
        leaving  blocks of earlier sets that fill in for `waiting`; not pinned

    `held` and `waiting` have no block in common and are together within the budget, so that the slots of what
    waits are the request's own all the time, lent to the cache. Arrays are replaced, never changed in place.

    Attributes:
        held: see above, like `waiting` and `leaving`.
        ranks: float32, scores of the first held blocks; those behind them are newer than the scoring.
        slots: slots of the first held blocks; those behind them are not looked up yet.
        portions: what was prefetched since the set was replaced, a portion each.
    """

    def __init__(self) -> None:
        self.held: IntArray = NOTHING
        self.ranks: FloatArray = NO_SCORES
        self.slots: IntArray = NOTHING
        self.waiting: IntArray = NOTHING
        self.leaving: IntArray = NOTHING
        self.portions: list[IntArray] = []

    @property
    def is_changing(self) -> bool:
        """Whether blocks of the set are not in force yet."""
        return bool(self.waiting.size)

    def replace(self, held: IntArray, scores: FloatArray, waiting: IntArray, leaving: IntArray) -> None:
        """Hold other blocks from now on.

        Args:
            held: the blocks that have a slot, or get one in this step.
            scores: float32 by position; see `ranking.best`.
            waiting: the blocks that have to wait for one, best first.
            leaving: what fills in for them meanwhile.
        """
        self.held, self.ranks, self.slots = held, ranks_of(held, scores), NOTHING
        self.waiting, self.leaving = waiting, leaving
        self.portions = []

    def grow(self, first: int, end: int, excess: int, inner: slice, scores: FloatArray) -> IntArray:
        """Hold the newest blocks `[first, end)` as well, and do without the worst ones.

        Args:
            first: first position of the newest blocks.
            end: behind the last of them.
            excess: how many blocks to do without, of those that are waiting or held at `inner`.
            inner: indices of the held blocks that may go.
            scores: float32 by position; see `ranking.best`.

        Returns:
            int32 positions that are no longer held; what only waited is not among them.
        """
        worst = self._worst(excess, inner, scores) if excess > 0 else slice(0, 0)
        dropped = self.held[worst]
        self.held = replaced(self.held, worst, np.arange(first, end, dtype=np.int32))
        if dropped.size:
            self.ranks, self.slots = without(self.ranks, worst), without(self.slots, worst)
        return dropped

    def _worst(self, count: int, inner: slice, scores: FloatArray) -> slice | IntArray:
        """Indices of held blocks to do without, after waiting ones that are worse have been given up."""
        if count == 1 and not self.waiting.size:  # in almost every step
            ranks = self.ranks[inner]
            worst = inner.start + (int(ranks.argmin()) if ranks.size else 0)
            return slice(worst, worst + 1)
        candidates = merged(self.held[inner], self.waiting)
        given_up = worst_to_best(candidates, scores)[:count]
        self.waiting = self.waiting[~np.isin(self.waiting, given_up)]
        return np.flatnonzero(np.isin(self.held, given_up)).astype(np.int32)

    def join(self, count: int, scores: FloatArray) -> None:
        """Hold the first `count` of the waiting blocks, which this step brings."""
        portion = np.sort(self.waiting[:count])
        self.portions.append(portion)
        self.waiting = self.waiting[count:]
        self.held = merged(self.held, portion)
        self.ranks, self.slots = ranks_of(self.held, scores), NOTHING

    def fill_in(self, readable_leaving: IntArray, scores: FloatArray) -> None:
        """Let the best of the leaving blocks that still have a slot stand in for what waits, one for one."""
        self.leaving = best(readable_leaving, scores, self.waiting.size)
