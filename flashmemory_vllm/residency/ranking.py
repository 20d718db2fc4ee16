"""Which blocks of a request are worth a slot."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flashmemory_vllm.residency.types import BoolArray, FloatArray


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

    @property
    def num_forced(self) -> int:
        """Blocks that are in the set in any case."""
        return self.sink_end + self.num_blocks - self.recent_start

    @property
    def num_candidates(self) -> int:
        """Blocks that may be chosen or left."""
        return self.recent_start - self.sink_end


def best(worth: FloatArray, count: int) -> BoolArray:
    """Which `count` blocks are the best; of equal ones the last. All, if there are no more.

    Args:
        worth: float32 `[n]`, not NaN.
        count: how many.
    """
    if count >= worth.size:
        return np.ones(worth.size, np.bool_)
    if count <= 0:
        return np.zeros(worth.size, np.bool_)
    least = np.partition(worth, worth.size - count)[worth.size - count]
    is_best: BoolArray = worth > least
    equal = np.flatnonzero(worth == least)
    is_best[equal[equal.size - (count - np.count_nonzero(is_best)) :]] = True
    return is_best
