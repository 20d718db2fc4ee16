"""The host's account of what decoding requests read: all rows as arrays, changed by the device's lists in one pass.

The device decides which blocks come and which go; the host never compares what they are worth. The list of a step is
applied two steps later, when it has landed in any case, and names for each request and layer group who comes and who
goes. One that begins a block takes a slot at once, and its next list says who goes for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.entries import Entries
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import Copies, Geometry, IntArray

NOBODY = -1
# Columns of a list's row before its positions: place, epoch, step, how many come, how many go, blocks worth a slot
HEADER = 6


class Pairs(NamedTuple):
    """Changes of one layer group, int32 `[n]` each: in a place a position comes, another goes; -1 if there is none."""

    place: IntArray
    come: IntArray
    go: IntArray

    def where(self, mask: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Pairs:
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


class Books:
    """Tables, epochs and blocks of all places. Slots are those of a table that prefill shares.

    Args:
        geometry: sizes of the paged memory.
        slots: where blocks are.
        num_places: P, most requests that decode at once.
        width: W, most blocks of a request.

    Attributes:
        ids: int32 `[P, W]` logical blocks of each place by position.
        epoch: int32 `[P]` tenants that a place has had; a list of an earlier one is not for its tenant now.
        groups: the tables of each layer group.
    """

    def __init__(self, geometry: Geometry, slots: SlotTable, num_places: int, width: int) -> None:
        self._slots = slots
        self.ids: IntArray = np.zeros((num_places, width), np.int32)
        self.epoch: IntArray = np.zeros(num_places, np.int32)
        self.groups = [Entries(num_places, width) for _ in range(geometry.num_groups)]
        self._applied = -1

    def enter(
        self, place: int, ids: IntArray, positions: Sequence[IntArray], *, sink: int, recent: int
    ) -> list[Copies]:
        """A request begins to decode with the sets of its first list.

        Args:
            place: a free one.
            ids: int32 `[n]` its logical blocks.
            positions: per group int32 `[k]`, ascending, with the sink and the recent blocks.
            sink: how many of the first never go.
            recent: how many of the newest keep their order, one or more.

        Returns:
            What is to be copied from the host.

        Raises:
            IntegrityError: a block has neither slot nor host copy, or there is no room.
        """
        self.ids[place, : ids.size] = ids
        copies = []
        for group, (entries, chosen) in enumerate(zip(self.groups, positions, strict=True)):
            slots, missing = self._slots.claim(group, ids[chosen])
            entries.fill(place, chosen, slots, sink, recent)
            copies.append(missing)
        return copies

    def leave(self, place: int) -> None:
        """A request has ended or lost its blocks: lists that are on their way are not for its successor."""
        for group, entries in enumerate(self.groups):
            self._slots.unpin(group, self.ids[place, entries.positions_of(place)])
            entries.clear(place)
        self.epoch[place] += 1

    def append(self, place: IntArray, position: IntArray, blocks: IntArray, recent: IntArray) -> list[Copies]:
        """Requests begin a block each: it gets a slot in every group, and nobody goes for it yet.

        Args:
            place: int32 `[n]`, all different.
            position: int32 `[n]` of the new blocks.
            blocks: int32 `[n]` logical ids.
            recent: int32 `[n]` how many of the newest blocks keep their order from now on.
        """
        self.ids[place, position] = blocks
        fresh = []
        for group, entries in enumerate(self.groups):
            fresh.append(self._slots.hold_fresh(group, blocks))
            entries.append(place, position, fresh[-1].slots, recent)
        return fresh

    def apply(self, step: int, rows: IntArray) -> list[Copies]:
        """Bring the list of a step into force, for every place whose tenant is still the one it was made for.

        Args:
            step: whose list it is; later than that of the last call.
            rows: int32 `[n, G, 6 + 2 L]`, see `pairs_of`; a row of padding has place -1.

        Returns:
            What is to be copied from the host, an entry for each group that lacks something.

        Raises:
            IntegrityError: the list is not the next one, or does not follow from the sets in force; nothing is
                changed then. Or there is no room.
        """
        if step <= self._applied:
            raise IntegrityError(f"the list of step {step} comes after that of step {self._applied}")
        rows = rows[rows[:, 0, 0] != NOBODY]
        if not ((rows[:, 0, 0] >= 0) & (rows[:, 0, 0] < self.epoch.size)).all():
            raise IntegrityError(f"step {step}: places {rows[:, 0, 0]}, allowed are 0 to {self.epoch.size - 1}")
        rows = rows[rows[:, 0, 1] == self.epoch[rows[:, 0, 0]]]
        pairs = [pairs_of(rows[:, group]) for group in range(len(self.groups))]
        for group, of_group in enumerate(pairs):
            self._check(step, group, of_group)
        self._applied = step
        copies = [one for group, of_group in enumerate(pairs) for one in self._change(group, of_group)]
        return [one for one in copies if one.blocks.size]

    def pins(self) -> IntArray:
        """int32 `[G, S]` tables that name each slot."""
        pins = np.zeros_like(self._slots.pins)
        for group, place, entries in self._tables():
            np.add.at(pins[group], entries.slots_of(place), 1)
        return pins

    def check_integrity(self) -> None:
        """Check every table, and that its blocks are where it says; costs a pass over all of them.

        Raises:
            IntegrityError: with the place and group.
        """
        for group, place, entries in self._tables():
            entries.check_integrity(place)
            blocks = self.ids[place, entries.positions_of(place)]
            if (self._slots.lut[group, blocks] != entries.slots_of(place)).any():
                raise IntegrityError(f"place {place} group {group}: blocks {blocks} have moved to other slots")
        if (self.pins() > self._slots.pins).any():
            raise IntegrityError("a table names a slot that has no pin for it")

    def _tables(self) -> Iterator[tuple[int, int, Entries]]:
        for group, entries in enumerate(self.groups):
            for place in np.flatnonzero(entries.count).tolist():
                yield group, place, entries

    def _check(self, step: int, group: int, pairs: Pairs) -> None:
        """A list follows from the sets in force, so that a corrupt one cannot corrupt tables."""
        entries = self.groups[group]
        for what, positions, allowed in (("comes", pairs.come, entries.may_come), ("goes", pairs.go, entries.may_go)):
            is_there = positions != NOBODY
            place, named = pairs.place[is_there], positions[is_there]
            known = (named >= 0) & (named < self.ids.shape[1])
            is_wrong = ~known
            is_wrong[known] = ~allowed(place[known], named[known])
            both = place.astype(np.int64) * self.ids.shape[1] + named
            if is_wrong.any() or np.unique(both).size != both.size:
                raise IntegrityError(
                    f"step {step} group {group}: the list says that of places {place} blocks {named} {what}, "
                    "which does not follow from their sets"
                )

    def _change(self, group: int, pairs: Pairs) -> Iterator[Copies]:
        has_both = (pairs.come != NOBODY) & (pairs.go != NOBODY)
        both = pairs if has_both.all() else pairs.where(has_both)
        if both.place.size:  # almost always all of them
            yield self._replace(group, both)
        if both is not pairs:
            yield from self._one_by_one(pairs.where(pairs.go == NOBODY), lambda one: self._insert(group, one))
            yield from self._one_by_one(pairs.where(pairs.come == NOBODY), lambda one: self._remove(group, one))

    def _replace(self, group: int, pairs: Pairs) -> Copies:
        # First those that come: one that goes from a row may come into another
        slots, copies = self._slots.claim(group, self.ids[pairs.place, pairs.come])
        self._slots.unpin(group, self.ids[pairs.place, pairs.go])
        self.groups[group].replace(pairs.place, pairs.come, pairs.go, slots)
        return copies

    def _insert(self, group: int, pairs: Pairs) -> Copies:
        slots, copies = self._slots.claim(group, self.ids[pairs.place, pairs.come])
        self.groups[group].insert(pairs.place, pairs.come, slots)
        return copies

    def _remove(self, group: int, pairs: Pairs) -> None:
        self._slots.unpin(group, self.ids[pairs.place, pairs.go])
        self.groups[group].remove(pairs.place, pairs.go)

    @staticmethod
    def _one_by_one(pairs: Pairs, change: Callable[[Pairs], Copies | None]) -> Iterator[Copies]:
        """Rows whose budget or length has just changed, mostly by one block: one block of each at a time."""
        while pairs.place.size:
            _, first = np.unique(pairs.place, return_index=True)
            is_first = np.zeros(pairs.place.size, np.bool_)
            is_first[first] = True
            copies = change(pairs.where(is_first))
            if copies is not None:
                yield copies
            pairs = pairs.where(~is_first)
