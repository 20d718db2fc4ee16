"""The format of a list: which blocks come into sets, and which go."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flashmemory_vllm.residency.types import BoolArray, IntArray

NOBODY = -1
# Columns of a list's row before its positions: place, epoch, step, how many come, how many go, blocks worth a slot
HEADER = 6
COMES, WORTH = 3, 5


class Pairs(NamedTuple):
    """Changes of one layer group, int32 `[n]` each: in a place a position comes, another goes; -1 if there is none."""

    place: IntArray
    come: IntArray
    go: IntArray

    def where(self, mask: BoolArray) -> Pairs:
        """Some of them."""
        return Pairs(self.place[mask], self.come[mask], self.go[mask])


def pairs_of(rows: IntArray) -> Pairs:
    """Read rows of a list: who comes takes the entry of who goes, as far as there are both.

    Args:
        rows: int32 `[n, 6 + 2 L]`: the header, then L positions that come and L that go, the first `comes` and `goes`
            of them valid.
    """
    longest = (rows.shape[1] - HEADER) // 2
    column = np.arange(longest, dtype=np.int32)
    comes, goes = rows[:, 3:4], rows[:, 4:5]
    used = column < np.maximum(comes, goes)
    come = np.where(column < comes, rows[:, HEADER : HEADER + longest], NOBODY)
    go = np.where(column < goes, rows[:, HEADER + longest : HEADER + 2 * longest], NOBODY)
    return Pairs(np.broadcast_to(rows[:, :1], used.shape)[used], come[used], go[used])
