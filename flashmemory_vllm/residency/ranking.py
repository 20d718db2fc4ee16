"""Which blocks of a request are worth a slot.

Positions are int32 `[n]`, ascending, without repetition. Scores are float32 `[num_scored]` by position from 0; blocks
behind them are newer than the scoring.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np

from flashmemory_vllm.residency.types import NOTHING, FloatArray, IntArray

Numbers = TypeVar("Numbers", IntArray, FloatArray)


class Frame(NamedTuple):
    """The blocks that a decode row cannot do without: `[0, sink_end)` and `[recent_start, num_blocks)`.

    Attributes:
        sink_end: end of the sink.
        recent_start: first of the newest blocks, all blocks written in the step among them.
        num_blocks: blocks of the request that hold tokens after the step.
    """

    sink_end: int
    recent_start: int
    num_blocks: int

    def candidates(self) -> IntArray:
        """int32 `[recent_start - sink_end]` positions that may be chosen."""
        return np.arange(self.sink_end, self.recent_start, dtype=np.int32)

    def num_chosen(self, target: IntArray) -> int:
        """Blocks of a set beside the forced ones."""
        return target.size - self.sink_end - (self.num_blocks - self.recent_start)

    def with_best(self, candidates: IntArray, scores: FloatArray, budget: int) -> IntArray:
        """Positions `[at most budget]`: the forced blocks, and as many of the best candidates as there is room for."""
        sink = np.arange(min(self.sink_end, self.recent_start), dtype=np.int32)
        recent = np.arange(self.recent_start, self.num_blocks, dtype=np.int32)
        return np.concatenate((sink, best(candidates, scores, budget - sink.size - recent.size), recent))


def best(positions: IntArray, scores: FloatArray, count: int) -> IntArray:
    """The `count` best positions `[min(count, n)]`, in order of position.

    Args:
        positions: int32 `[n]`.
        scores: float32 `[num_scored]` by position from 0, higher is better. Later positions are newer than
            the scoring: they rank above all scored ones, the newest first.
        count: how many; all, if there are no more.
    """
    if count >= positions.size:
        return positions
    if count <= 0:
        return NOTHING
    num_scored = int(np.searchsorted(positions, scores.size))
    num_unscored = positions.size - num_scored
    if num_unscored >= count:
        return positions[positions.size - count :]
    num_worst = positions.size - count
    worst = np.argpartition(scores[positions[:num_scored]], num_worst)[:num_worst]
    is_best = np.ones(positions.size, np.bool_)
    is_best[worst] = False
    return positions[is_best]


def worth_a_slot(positions: IntArray, scores: FloatArray, threshold: float) -> IntArray:
    """The positions whose score reaches the threshold, and those that are newer than the scoring."""
    num_scored = int(np.searchsorted(positions, scores.size))
    is_worth = np.ones(positions.size, np.bool_)
    is_worth[:num_scored] = scores[positions[:num_scored]] >= threshold
    return positions[is_worth]


def worst_to_best(positions: IntArray, scores: FloatArray) -> IntArray:
    """The positions `[n]` in ascending rank; see `best`."""
    num_scored = int(np.searchsorted(positions, scores.size))
    order = np.argsort(scores[positions[:num_scored]], kind="stable")
    return np.concatenate((positions[order], positions[num_scored:]))


def ranks_of(positions: IntArray, scores: FloatArray) -> FloatArray:
    """Scores `[m]` of the first m positions; the others are newer than the scoring."""
    return scores[positions[: np.searchsorted(positions, scores.size)]]


def without(array: Numbers, indices: slice | IntArray) -> Numbers:
    """The array `[n]` without what stands at the indices, int32 `[k]` ascending; some may be behind its end."""
    if isinstance(indices, slice):  # much faster than `delete`
        return np.concatenate((array[: indices.start], array[indices.stop :]))
    return np.delete(array, indices[: np.searchsorted(indices, array.size)])


def replaced(array: Numbers, indices: slice | IntArray, added: Numbers) -> Numbers:
    """The array `[n]` without what stands at the indices, and with `added` `[m]` at its end: `[n - k + m]`."""
    if isinstance(indices, slice):
        return np.concatenate((array[: indices.start], array[indices.stop :], added))
    return np.concatenate((np.delete(array, indices), added))


def merged(positions: IntArray, others: IntArray) -> IntArray:
    """All positions `[n + m]` of two arrays that have none in common."""
    return np.sort(np.concatenate((positions, others)))


def difference(positions: IntArray, others: IntArray) -> IntArray:
    """The positions that are not among the others."""
    if positions.size == 0 or others.size == 0:
        return positions
    # A bitmap over the request's blocks: several times faster than sorting or searching.
    is_other = np.zeros(max(positions[-1], others[-1]) + 1, np.bool_)
    is_other[others] = True
    return positions[~is_other[positions]]
