"""The host's account of what decoding requests read: all rows as arrays, changed by the device's lists in one pass.

The device decides which blocks come and which go; the host never compares what they are worth. The list of a step is
applied two steps later, when it has landed in any case, and names for each request and layer group who comes and who
goes. One that begins a block takes a slot at once, and its next list says who goes for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.awaited import Awaited, Taken
from flashmemory_vllm.residency.entries import NO_ENTRY, Entries
from flashmemory_vllm.residency.lists import NOBODY, Pairs, one_by_one, pairs_of
from flashmemory_vllm.residency.requests import ScheduledRows
from flashmemory_vllm.residency.slot_arrays import NOT_RESIDENT, NULL_SLOT
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import BoolArray, Copies, Geometry, IntArray, has_repeats


class Books:
    """Tables, epochs and blocks of all places. Slots are those of a table that prefill shares.

    What a step changes is written down first, and gives slots up; blocks that have a slot are claimed on the way. Only
    `settle` takes slots, for all that lack one, so that no change of a step needs what another one is about to give up.

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
        self._is_wide = np.zeros(num_places, np.bool_)
        self._recalled, self._prefetched = ([Awaited() for _ in self.groups] for _ in range(2))
        self._begun, self._applied = Awaited(), -1

    def clear(self) -> None:
        """Forget all tables and what was awaited, without a look at slots; epochs go on."""
        for place in range(self.epoch.size):
            for entries in self.groups:
                entries.clear(place)
        for awaited in (self._begun, *self._recalled, *self._prefetched):
            awaited.take()
        self._is_wide[:] = False
        self.epoch += 1
        self._applied = -1

    def know_blocks(self, place: int, first: int, ids: Sequence[int]) -> None:
        """The logical blocks of a place from a position on; those that no request is long enough for are left out."""
        self.ids[place, first : first + len(ids)] = ids[: max(0, self.ids.shape[1] - first)]

    def enter(
        self, place: int, ids: IntArray, positions: Sequence[IntArray], *, sink: int, recent: int, begun: int = 0
    ) -> None:
        """A request begins to decode with the sets of its first list.

        Args:
            place: a free one.
            ids: int32 `[n]` its logical blocks.
            positions: per group int32 `[k]`, ascending, with the sink and the recent blocks.
            sink: how many of the first never go.
            recent: how many of the newest keep their order, one or more.
            begun: how many of the newest are begun in this step. Default: none.

        Raises:
            IntegrityError: the place is taken, or a set is none of such a request; nothing is changed then.
        """
        end, num_sink = ids.size, min(sink, ids.size - recent)
        for entries, chosen in zip(self.groups, positions, strict=True):
            is_set = (np.diff(chosen) > 0).all() and np.array_equal(chosen[:num_sink], np.arange(num_sink))
            if entries.count[place] or not is_set or not np.array_equal(chosen[-recent:], np.arange(end - recent, end)):
                raise IntegrityError(
                    f"place {place} with {entries.count[place]} entries: blocks {chosen} are given as the set of "
                    f"a request of {end} blocks, {num_sink} of the sink and {recent} recent ones"
                )
        self.ids[place, : ids.size] = ids
        for group, (entries, chosen) in enumerate(zip(self.groups, positions, strict=True)):
            known = chosen[: chosen.size - begun]
            slots = np.full(chosen.size, NULL_SLOT, np.int32)
            slots[: known.size] = self._claim(group, np.full(known.size, place, np.int32), known, self._recalled)
            entries.fill(place, chosen, slots, sink, recent)
        if begun:
            self._begun.add(np.full(begun, place, np.int32), np.arange(ids.size - begun, ids.size, dtype=np.int32))

    def leave(self, place: int) -> None:
        """A request has ended or lost its blocks: lists that are on their way are not for its successor."""
        for group, entries in enumerate(self.groups):
            if entries.count[place]:
                self._slots.unpin(group, self.ids[place, entries.positions_of(place)])
                entries.clear(place)
        self._is_wide[place] = False
        self.epoch[place] += 1

    def append(self, place: IntArray, position: IntArray, blocks: IntArray, recent: IntArray) -> None:
        """Requests begin a block each: it gets a slot in every group, and nobody goes for it yet.

        Args:
            place: int32 `[n]`, all different.
            position: int32 `[n]` of the new blocks.
            blocks: int32 `[n]` logical ids.
            recent: int32 `[n]` how many of the newest blocks keep their order from now on.
        """
        self.ids[place, position] = blocks
        for entries in self.groups:
            entries.append(place, position, np.full(place.size, NULL_SLOT, np.int32), recent)
        self._begun.add(place, position)

    def keep_recent(self, place: IntArray, recent: IntArray) -> None:
        """So many of the newest blocks of places keep their order from now on, int32 `[n]`; no more than so far."""
        for entries in self.groups:
            entries.keep_recent(place, recent)

    def apply(self, step: int, rows: IntArray, *, at_once: bool = False) -> list[Pairs]:
        """Bring the list of a step into force, for every place whose tenant is still the one it was made for.

        Args:
            step: whose list it is; later than that of the last call.
            rows: int32 `[n, G, 6 + 2 L]`, see `pairs_of`; a row of padding has place -1.
            at_once: some rows of a list, whose others come later: the order of steps is not for these. Default: False.

        Returns:
            Per group the changes that are in force now.

        Raises:
            IntegrityError: the list is not the next one, or does not follow from the sets in force; nothing is
                changed then.
        """
        if step <= self._applied and not at_once:
            raise IntegrityError(f"the list of step {step} comes after that of step {self._applied}")
        if rows[:, 0, 0].min(initial=0) == NOBODY:
            rows = rows[rows[:, 0, 0] != NOBODY]
        place = rows[:, 0, 0]
        if place.min(initial=0) < 0 or place.max(initial=0) >= self.epoch.size:
            raise IntegrityError(f"step {step}: places {place}, allowed are 0 to {self.epoch.size - 1}")
        is_mine = rows[:, 0, 1] == self.epoch[place]
        if not is_mine.all():
            rows = rows[is_mine]
        pairs = [pairs_of(rows[:, group]) for group in range(len(self.groups))]
        for group, of_group in enumerate(pairs):
            self._check(step, group, of_group)
        if not at_once:
            self._applied = step
        for group, of_group in enumerate(pairs):
            self._change(group, of_group, self._recalled if at_once else self._prefetched)
        return pairs

    def apply_quickly(self, step: int, rows: IntArray, asked: IntArray) -> list[Pairs] | None:  # noqa: ARG002
        """As `apply`, where there is a quicker way for such a list: see `QuickBooks`. None: nothing is changed."""
        return None

    def grow_quickly(self, rows: ScheduledRows, most_recent: IntArray) -> bool:  # noqa: ARG002
        """As `append` and `keep_recent` for a step's rows: see `QuickBooks`. False: nothing is changed."""
        return False

    def widen(self, place: int, positions: Sequence[IntArray]) -> None:
        """A request reads blocks beside its sets until it narrows; lists go on changing the sets.

        Args:
            place: of a request with a table.
            positions: per group int32 `[k]` of full blocks that the table does not have.
        """
        self._is_wide[place] = True
        for group, (entries, more) in enumerate(zip(self.groups, positions, strict=True)):
            if more.size:
                slots = self._claim(group, np.full(more.size, place, np.int32), more, self._prefetched)
                entries.widen(place, more, slots)

    def narrow(self, place: int) -> None:
        """A request does without what it read beside its sets."""
        self._is_wide[place] = False
        for group, entries in enumerate(self.groups):
            self._slots.unpin(group, self.ids[place, np.flatnonzero(entries.is_extra[place])])
            entries.narrow(place)

    def settle(self) -> Taken:
        """Give slots to all blocks that lack one since the last call, those that are begun first.

        Raises:
            IntegrityError: a block has neither slot nor host copy, or there is no room.
        """
        recalls, prefetches, (place, position) = list[Copies](), list[Copies](), self._begun.take()
        fresh = [self._hold_fresh(group, place, position) for group in range(len(self.groups)) if place.size]
        for brought, awaited in ((recalls, self._recalled), (prefetches, self._prefetched)):
            for group in range(len(self.groups)):
                place, position = awaited[group].take()
                if place.size:
                    copies = self._hold(group, place, position)
                    brought.extend([copies] if copies.blocks.size else ())
        return Taken(fresh, recalls, prefetches)

    def _hold_fresh(self, group: int, place: IntArray, position: IntArray) -> Copies:
        copies = self._slots.hold_fresh(group, self.ids[place, position])
        self.groups[group].set_slots(place, position, copies.slots)
        return copies

    def _hold(self, group: int, place: IntArray, position: IntArray) -> Copies:
        slots, copies = self._slots.claim(group, self.ids[place, position])
        self.groups[group].set_slots(place, position, slots)
        return copies

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
        # All that come, then all that go: one that does both is wrong as well
        place, named = np.concatenate((pairs.place, pairs.place)), np.concatenate((pairs.come, pairs.go))
        comes = np.arange(named.size) < pairs.place.size
        is_there = named != NOBODY
        if not is_there.all():
            place, named, comes = place[is_there], named[is_there], comes[is_there]
        width = self.ids.shape[1]
        is_inside = named.min(initial=0) >= 0 and named.max(initial=0) < width
        is_right = is_inside and self.groups[group].may_change(place, named, comes).all()
        if not is_right or has_repeats(place.astype(np.int64) * width + named):
            raise IntegrityError(
                f"step {step} group {group}: the list says that of places {place[comes]} blocks {named[comes]} come, "
                f"and that of places {place[~comes]} blocks {named[~comes]} go, which does not follow from their sets"
            )

    def _claim(self, group: int, place: IntArray, position: IntArray, awaited: Sequence[Awaited]) -> IntArray:
        """Slots of blocks that have one, which have a claim more now; the null slot for others, which wait for one."""
        blocks = self.ids[place, position]
        slots: IntArray = self._slots.lut[group, blocks]
        is_missing = slots == NOT_RESIDENT
        if is_missing.any():
            awaited[group].add(place[is_missing], position[is_missing])
            slots[is_missing] = NULL_SLOT
            blocks = blocks[~is_missing]
        if blocks.size:  # mostly all have to come from the host
            self._slots.pin(group, blocks)
        return slots

    def _change(self, group: int, pairs: Pairs, awaited: Sequence[Awaited]) -> None:
        is_wide = self._is_wide[pairs.place]
        if is_wide.any():
            pairs = self._exchange(group, pairs, is_wide)
        comes, goes = pairs.come != NOBODY, pairs.go != NOBODY
        has_both = comes & goes
        # Almost always all, but for rows that have begun a block
        both, gone = (pairs, pairs) if has_both.all() else (pairs.where(has_both), pairs.where(goes))
        if pairs.place.size:
            # First those that come: one that goes from a row may come into another
            slots = self._claim(group, both.place, both.come, awaited)
            self._slots.unpin(group, self.ids[gone.place, gone.go])
            self.groups[group].replace(both.place, both.come, both.go, slots)
        if both is not pairs:
            for one in one_by_one(pairs.where(~goes)):
                slots = self._claim(group, one.place, one.come, awaited)
                self.groups[group].insert(one.place, one.come, slots)
            for one in one_by_one(pairs.where(~comes)):
                self.groups[group].remove(one.place, one.go)

    def _exchange(self, group: int, pairs: Pairs, is_wide: BoolArray) -> Pairs:
        """Of places with blocks beside their sets, who goes stays in the table, who is there has come; what is left."""
        entries = self.groups[group]
        goes, comes = is_wide & (pairs.go != NOBODY), is_wide & (pairs.come != NOBODY)
        entries.is_extra[pairs.place[goes], pairs.go[goes]] = True
        entries.is_extra[pairs.place[comes], pairs.come[comes]] = False
        is_there = comes.copy()
        is_there[comes] = entries.entry[pairs.place[comes], pairs.come[comes]] != NO_ENTRY
        left = Pairs(pairs.place, np.where(is_there, NOBODY, pairs.come), np.where(goes, NOBODY, pairs.go))
        return left.where((left.come != NOBODY) | (left.go != NOBODY))
