"""The quick way through the books: most lists and most new slots of a step, by loops that are compiled.

`Books` describes what is done; what comes out is the same, and what is rare or wrong is left to it.
"""

from __future__ import annotations

import time

import numpy as np

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.asked import Ask
from flashmemory_vllm.residency.books import Books
from flashmemory_vllm.residency.lists import HEADER, Pairs
from flashmemory_vllm.residency.quick import change_loops, growth_loops, slot_loops
from flashmemory_vllm.residency.quick.arrays import TableArrays
from flashmemory_vllm.residency.quick.change_loops import BROKEN, NOT_DONE, Scratch
from flashmemory_vllm.residency.quick.slot_loops import Given
from flashmemory_vllm.residency.requests import ScheduledRows
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import Copies, Geometry, IntArray, distinct

# Changes of a step, blocks that get slots, and entries that are edited: of more, as when prompts end, numpy takes care
MOST, MOST_EDITED = 4096, 16384


class QuickBooks(Books):
    """Books with loops over their arrays. The first ones compile them, or read what was compiled before.

    Attributes:
        seconds: that it took.
        tables: arrays of each layer group.
    """

    def __init__(self, geometry: Geometry, slots: SlotTable, num_places: int, width: int) -> None:
        super().__init__(geometry, slots, num_places, width)
        self._of_slots = [slots.arrays(group) for group in range(geometry.num_groups)]
        self.tables = [TableArrays(self.ids, self.epoch, self._is_wide, *entries.arrays) for entries in self.groups]
        two = (2, MOST)
        self._pairs = [np.empty((3, MOST), np.int32) for _ in self.groups]
        self._scratch = Scratch(np.empty((2, MOST_EDITED), np.int32), np.empty(two, np.int32), np.empty(MOST, np.int32))
        self._given = Given(np.empty(two, np.int32), np.empty(two, np.int64))
        started = time.perf_counter()
        self._warm_up()
        self.seconds = time.perf_counter() - started

    def apply_quickly(self, step: int, rows: IntArray, asked: IntArray) -> list[Pairs] | None:
        """As `apply`, if the list is like most; otherwise nothing is changed.

        Args:
            step: whose list it is.
            rows: as in `apply`.
            asked: int32 `[n, len(Ask)]` of the same rows.

        Returns:
            Per group the changes that are in force now, until the next call; None: `apply` has to do it.
        """
        if step <= self._applied:
            return None
        nums = []
        for group, (table, pairs) in enumerate(zip(self.tables, self._pairs, strict=True)):
            num = change_loops.read_pairs(step, rows, asked, group, table, pairs)
            if num == NOT_DONE or not change_loops.follows(pairs, num, table, self._of_slots[group], MOST_EDITED):
                return None
            nums.append(num)
        self._applied = step
        return [self._change_quickly(group, num) for group, num in enumerate(nums)]

    def _change_quickly(self, group: int, num: int) -> Pairs:
        pairs, scratch = self._pairs[group], self._scratch
        num_awaited, num_edited = change_loops.change(
            pairs, num, self.tables[group], self._of_slots[group], self._slots.clock, scratch
        )
        if num_awaited == BROKEN:
            raise IntegrityError(f"group {group}: a slot has fewer pins than tables that name it")
        if num_edited:
            self.groups[group].note(*scratch.edited[:, :num_edited].copy())
        if num_awaited:
            self._prefetched[group].add(*scratch.awaited[:, :num_awaited].copy())
        return Pairs(*pairs[:, :num])

    def grow_quickly(self, rows: ScheduledRows, most_recent: IntArray) -> bool:
        """Have rows begin the blocks that they write first, as `append` and `keep_recent`.

        Args:
            rows: of a step; those without a table are left out.
            most_recent: int32 `[m]` blocks that keep their order, by the number of tokens.

        Returns:
            Whether it is done; otherwise nothing is changed.
        """
        fields = rows.place, rows.first_fresh, rows.end, rows.num_tokens_after, most_recent
        nums = [growth_loops.may_grow(*fields, table) for table in self.tables]
        if NOT_DONE in nums:
            return False
        num = nums[0]
        begun = np.empty((2, num), np.int32)
        for table, entries in zip(self.tables, self.groups, strict=True):
            edited = np.empty((2, num), np.int32)
            growth_loops.grow(*fields, table, begun, edited)
            entries.note(*edited)
        self._begun.add(*begun)
        return True

    def _hold_fresh(self, group: int, place: IntArray, position: IntArray) -> Copies:
        blocks = self.ids[place, position]
        copies = self._hold_quickly(group, place, position, blocks, is_fresh=True)
        return super()._hold_fresh(group, place, position) if copies is None else copies

    def _hold(self, group: int, place: IntArray, position: IntArray) -> Copies:
        blocks = distinct(self.ids[place, position])
        copies = self._hold_quickly(group, place, position, blocks, is_fresh=False)
        return super()._hold(group, place, position) if copies is None else copies

    def _hold_quickly(
        self, group: int, place: IntArray, position: IntArray, once: IntArray, *, is_fresh: bool
    ) -> Copies | None:
        if place.size > MOST:
            return None
        slots, given = self._slots, self._given
        num_missing, last_read, num_evicted = slot_loops.settle(
            place, position, once, self.tables[group], self._of_slots[group], slots.clock, given, is_fresh
        )
        if num_missing == NOT_DONE:
            return None
        if num_missing == BROKEN:
            raise IntegrityError(f"group {group}: slots without pins are not queued, or hold what is not on the host")
        if num_evicted:
            slots.note_evicted(*given.ages[:, :num_evicted].astype(np.float64))
        blocks, its_slots = given.missing[:, :num_missing].copy()
        return Copies(group, blocks, its_slots, slots.clock - 1 - last_read)

    def _warm_up(self) -> None:
        """Call every loop with nothing to do."""
        none = np.empty((0, len(self.groups), HEADER), np.int32)
        nowhere = none[:, 0, 0]
        self.apply_quickly(0, none, np.empty((0, len(Ask)), np.int32))
        for is_fresh in (True, False):
            self._hold_quickly(0, nowhere, nowhere, nowhere, is_fresh=is_fresh)
        pairs = np.empty((2, 0), np.int32)
        growth_loops.grow(nowhere, nowhere, nowhere, nowhere, nowhere, self.tables[0], pairs, pairs)
        self.grow_quickly(ScheduledRows.none(1), nowhere)
        self._applied = -1
