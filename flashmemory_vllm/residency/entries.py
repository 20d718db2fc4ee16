"""The block tables of all decoding requests in one layer group, as arrays by place.

A table is the sink, far blocks in any order, recent blocks in order, the tail last. Order matters to attention in the
tail only: keys carry their positions, and only full blocks are left out. So a block that comes takes the entry of one
that goes, and the oldest recent block becomes a far one without a move.

Arguments are int32 `[n]` arrays, one element a change: a place, a position in its request, a slot.
"""

from __future__ import annotations

import numpy as np

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.types import BoolArray, IntArray

NO_ENTRY = -1


class Entries:
    """Tables of one layer group.

    Args:
        num_places: P.
        width: W, most blocks of a request.

    Attributes:
        entry: int32 `[P, W]` where a position stands in its table, -1 if nowhere.
        position: int32 `[P, W + 1]` positions by entry.
        slot: int32 `[P, W + 1]` slots by entry.
        count: int32 `[P]` entries of each table; 0 if the place is free.
        sink: int32 `[P]` first entries, which never go.
        recent: int32 `[P]` entries at the end of the table that keep their order.
        is_extra: bool `[P, W]` positions in the table that are in no set: the place keeps all its blocks for a while.
    """

    def __init__(self, num_places: int, width: int) -> None:
        # One more than W: a row has a block too many for two steps after it has begun one
        size = (num_places, width + 1)
        self.entry: IntArray = np.full((num_places, width), NO_ENTRY, np.int32)
        self.position: IntArray = np.zeros(size, np.int32)
        self.slot: IntArray = np.zeros(size, np.int32)
        self.count: IntArray = np.zeros(num_places, np.int32)
        self.sink: IntArray = np.zeros(num_places, np.int32)
        self.recent: IntArray = np.zeros(num_places, np.int32)
        self.is_extra: BoolArray = np.zeros((num_places, width), np.bool_)
        self._edited: list[tuple[IntArray, IntArray]] = []

    @property
    def arrays(self) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray, IntArray, BoolArray]:
        """The attributes as `TableArrays` names them."""
        return self.entry, self.position, self.slot, self.count, self.sink, self.recent, self.is_extra

    def positions_of(self, place: int) -> IntArray:
        """int32 `[count]` positions in the order of the table, a view."""
        return self.position[place, : self.count[place]]

    def slots_of(self, place: int) -> IntArray:
        """int32 `[count]` slots of the same blocks, a view."""
        return self.slot[place, : self.count[place]]

    def copied(self, place: IntArray) -> tuple[IntArray, IntArray]:
        """Positions int32 `[n, k]` of the tables of places in their order, and `[n]` how many of them there are."""
        count = self.count[place]
        return self.position[place, : int(count.max(initial=0))], count

    def set_of(self, place: int) -> IntArray:
        """int32 `[k]` positions of the far blocks that are in the set."""
        far = self.position[place, self.sink[place] : self.count[place] - self.recent[place]]
        in_set: IntArray = far[~self.is_extra[place, far]]
        return in_set

    def may_change(self, place: IntArray, position: IntArray, comes: BoolArray) -> BoolArray:
        """Which positions may come into sets, or go from them.

        Who comes is in no set, and full: between sink and recent blocks. Who goes is a far block of the set.

        Args:
            place: int32 `[n]`.
            position: int32 `[n]`.
            comes: bool `[n]` who comes; all others go.

        Returns:
            Bool `[n]`.
        """
        at, sink, count = self.entry[place, position], self.sink[place], self.count[place]
        end, is_in_set = count - self.recent[place], at != NO_ENTRY
        is_in_set &= ~self.is_extra[place, position]
        # Of who comes its position lies between sink and recent blocks, of who goes its entry
        where, stop = np.where(comes, position, at), np.where(comes, self.position[place, end], end)
        may_change: BoolArray = (is_in_set != comes) & (where >= sink) & (where < stop) & (count > 0)
        return may_change

    def fill(self, place: int, positions: IntArray, slots: IntArray, sink: int, recent: int) -> None:
        """A whole table for a place whose table is empty; positions in the order that this module tells."""
        count = positions.size
        self.position[place, :count], self.slot[place, :count] = positions, slots
        self.entry[place, positions] = np.arange(count)
        self.count[place], self.sink[place], self.recent[place] = count, sink, recent
        self.note(np.full(count, place, np.int32), np.arange(count, dtype=np.int32))

    def clear(self, place: int) -> None:
        """A place becomes free."""
        self.entry[place, self.positions_of(place)] = NO_ENTRY
        self.is_extra[place, self.positions_of(place)] = False
        self.count[place] = 0

    def set_slots(self, place: IntArray, position: IntArray, slots: IntArray) -> None:
        """Name the slots of blocks that were put into tables without, since edits were last taken."""
        self.slot[place, self.entry[place, position]] = slots

    def keep_recent(self, place: IntArray, recent: IntArray) -> None:
        """So many of the newest blocks are recent from now on, the others have become far.

        Raises:
            IntegrityError: a place would have recent blocks without their order, or none.
        """
        if (recent > self.recent[place]).any() or (recent < 1).any():
            raise IntegrityError(f"places {place}: {recent} recent blocks, there were {self.recent[place]}")
        self.recent[place] = recent

    def widen(self, place: int, positions: IntArray, slots: IntArray) -> None:
        """Put blocks into a table that its set does not have, in front of the recent ones."""
        count, first_recent = int(self.count[place]), int(self.count[place] - self.recent[place])
        all_positions, all_slots = (
            np.concatenate((table[place, :first_recent], more, table[place, first_recent:count]))
            for table, more in ((self.position, positions), (self.slot, slots))
        )
        self.fill(place, all_positions, all_slots, self.sink[place], self.recent[place])
        self.is_extra[place, positions] = True

    def narrow(self, place: int) -> None:
        """Take all blocks out of a table that its set does not have."""
        positions, slots = self.positions_of(place), self.slots_of(place)
        is_kept = ~self.is_extra[place, positions]
        positions, slots = positions[is_kept], slots[is_kept]
        self.clear(place)
        self.fill(place, positions, slots, self.sink[place], self.recent[place])

    def append(self, place: IntArray, position: IntArray, slots: IntArray, recent: IntArray) -> None:
        """Each of the places, all of them different, begins a block; so many of its newest are recent from now on.

        Raises:
            IntegrityError: a place would have recent blocks without their order.
        """
        if (recent > self.recent[place] + 1).any():
            raise IntegrityError(f"places {place}: {recent} recent blocks, there were {self.recent[place]}")
        at = self.count[place]
        self.position[place, at], self.slot[place, at], self.entry[place, position] = position, slots, at
        self.count[place] += 1
        self.recent[place] = recent
        self.note(place, at)

    def replace(self, place: IntArray, come: IntArray, go: IntArray, slots: IntArray) -> None:
        """Each block that comes takes the entry of one that goes; places may repeat."""
        at = self.entry[place, go]
        self.position[place, at], self.slot[place, at] = come, slots
        self.entry[place, go] = NO_ENTRY
        self.entry[place, come] = at
        self.note(place, at)

    def insert(self, place: IntArray, come: IntArray, slots: IntArray) -> None:
        """One more far block for each of the places, all of them different, in front of the recent ones."""
        at, mask = self._recent(place)
        self._move(place, at, mask, 1)
        first = at[:, 0]
        self.position[place, first], self.slot[place, first], self.entry[place, come] = come, slots, first
        self.count[place] += 1
        self.note(place, first)

    def remove(self, place: IntArray, go: IntArray) -> None:
        """One far block less for each of the places, all of them different: the last far one takes its entry."""
        at, mask = self._recent(place)
        last, gap = at[:, 0] - 1, self.entry[place, go]
        self.position[place, gap], self.slot[place, gap] = self.position[place, last], self.slot[place, last]
        self.entry[place, self.position[place, last]] = gap
        self.entry[place, go] = NO_ENTRY
        self._move(place, at, mask, -1)
        self.count[place] -= 1
        self.note(place, gap)

    def take_edits(self) -> IntArray:
        """The entries that changed since the last call, int32 `[n, 3]` of place, entry and slot; some may repeat."""
        if not self._edited:
            return np.empty((0, 3), np.int32)
        place, at = (np.concatenate(parts) for parts in zip(*self._edited, strict=True))
        self._edited = []
        in_table = at < self.count[place]
        place, at = place[in_table], at[in_table]
        return np.stack((place, at, self.slot[place, at]), axis=1)

    def check_integrity(self, place: int) -> None:
        """Check a table against its inverse, and the order of its recent blocks.

        Raises:
            IntegrityError: with the place.
        """
        count, recent, positions = int(self.count[place]), int(self.recent[place]), self.positions_of(place)
        if np.unique(positions).size != count or (self.entry[place, positions] != np.arange(count)).any():
            raise IntegrityError(f"place {place}: positions {positions} are not where their entries say")
        if np.count_nonzero(self.entry[place] != NO_ENTRY) != count:
            raise IntegrityError(f"place {place}: an entry is known of a position that the table does not have")
        if count and ((np.diff(positions[count - recent :]) != 1).any() or positions[-1] != positions.max()):
            raise IntegrityError(f"place {place}: of {positions} the last {recent} are not the newest in order")
        sink, extra = int(self.sink[place]), np.flatnonzero(self.is_extra[place])
        if (positions[:sink] != np.arange(min(sink, count))).any():
            raise IntegrityError(f"place {place}: {positions} do not begin with the {sink} blocks of the sink")
        if not np.isin(extra, positions[sink : max(sink, count - recent)]).all():
            raise IntegrityError(f"place {place}: {extra} are beside the set, but not far blocks of {positions}")

    def _recent(self, place: IntArray) -> tuple[IntArray, BoolArray]:
        """Entries `[n, w]` of the recent blocks of places, and which of them there are."""
        column = np.arange(self.recent[place].max(), dtype=np.int32)
        return (self.count[place] - self.recent[place])[:, None] + column, column < self.recent[place][:, None]

    def _move(self, place: IntArray, at: IntArray, mask: BoolArray, by: int) -> None:
        """Move entries `[n, w]` of tables; positions stay with their slots."""
        row, source = np.broadcast_to(place[:, None], at.shape)[mask], at[mask]
        position, slot = self.position[row, source], self.slot[row, source]
        self.position[row, source + by], self.slot[row, source + by] = position, slot
        self.entry[row, position] = source + by
        self.note(row, source + by)

    def note(self, place: IntArray, at: IntArray) -> None:
        """Entries of tables have changed, int32 `[n]` each: see `take_edits`."""
        self._edited.append((place, at))
