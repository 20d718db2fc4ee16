"""The format of a list: which blocks come into sets, and which go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from flashmemory_vllm.residency.asked import Asked, AskedRow
from flashmemory_vllm.residency.types import BoolArray, IntArray, has_repeats

NOBODY = -1
# Columns of a list's row before its positions: place, epoch, step, how many come, how many go, blocks worth a slot
HEADER = 6
COMES, GOES, WORTH = 3, 4, 5


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
    comes, goes = rows[:, 3:4], rows[:, 4:5]
    most = np.maximum(comes, goes)
    # Mostly few of the columns are in use
    columns = min(longest, int(most.max(initial=0)))
    column = np.arange(columns, dtype=np.int32)
    used = column < most
    come = np.where(column < comes, rows[:, HEADER : HEADER + columns], NOBODY)
    go = np.where(column < goes, rows[:, HEADER + longest : HEADER + longest + columns], NOBODY)
    return Pairs(np.broadcast_to(rows[:, :1], used.shape)[used], come[used], go[used])


def one_by_one(pairs: Pairs) -> Iterator[Pairs]:
    """Rows whose budget or length has just changed, mostly by one block: one block of each at a time."""
    while pairs.place.size > 1 and has_repeats(pairs.place):
        _, first = np.unique(pairs.place, return_index=True)
        is_first = np.zeros(pairs.place.size, np.bool_)
        is_first[first] = True
        yield pairs.where(is_first)
        pairs = pairs.where(~is_first)
    if pairs.place.size:
        yield pairs


class Chosen(NamedTuple):
    """A list, or the part of it that comes into force in one step.

    Attributes:
        step: whose list it is.
        asked: what was asked for each of its rows.
        rows: int32 `[n, G, 6 + 2 L]`, see `pairs_of`; L may be another one each time. Of a row without a set all blocks
            come that are chosen.
        is_selected: bool `[n]` whose blocks were scored.
        at_once: it is in force in the step after its own.
        seconds: from asking for it to having it.
    """

    step: int
    asked: Asked
    rows: IntArray
    is_selected: BoolArray
    at_once: bool
    seconds: float


class FirstSet(NamedTuple):
    """The set that a request decodes with first.

    Attributes:
        asked: the row.
        far: per group int32 `[k]` the blocks between sink and recent ones, ascending.
        is_selected: its blocks were scored.
    """

    asked: AskedRow
    far: list[IntArray]
    is_selected: bool
