"""The slot table: which logical block each slot of each layer group holds, and what may be evicted.

The content of a logical block is in one of three states:

                 hold_fresh                  mark_written_back
        EMPTY ----------------> DIRTY ------------------------> CLEAN
          ^                       |                               |
          |                       | drop (request forgotten       | drop (the scheduler gave
          |                       | while the block is partial)   | the id to other tokens)
          +-----------------------+-------------------------------+

        EMPTY   no slot in any group, no valid host copy: the block has no content
        DIRTY   a slot in every group, pinned, no valid host copy: being written, or full and not yet copied
        CLEAN   valid host copy; in each group on its own it has a slot or not (hold, evict)

Two bits tell them apart: whether the host copy is valid, and whether the block has slots. A pin is one
request's claim on a block in one group: shared blocks have several. Slots without pins are cache: they keep
their block until somebody needs the room. They stand in a queue in the order in which they lost their last pin,
so that taking n of them costs n, however many there are, and the kernels that read the first in the queue ended
long ago.
"""

from __future__ import annotations

import numpy as np

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.counters import STEP_BOUNDS, Histogram
from flashmemory_vllm.residency.idle_queue import IdleQueue
from flashmemory_vllm.residency.slot_arrays import NO_OWNER, NOT_RESIDENT, NULL_BLOCK, NULL_SLOT, SlotArrays
from flashmemory_vllm.residency.slot_checks import check_group
from flashmemory_vllm.residency.types import BoolArray, Copies, DoubleArray, Geometry, IntArray, distinct


class SlotTable:
    """Slots, their owners and their pins in every layer group.

    Methods take blocks as int32 `[n]`, each of them once, in any order, and give slots and answers in their order.

    Attributes:
        lut: int32 `[G, N]` slot of each logical block, -1 if none.
        host_valid: bool `[N]`, whether a block has a valid host copy.
        pins: int32 `[G, S]` claims on each slot.
        last_read: int64 `[G, S]` the newest step whose kernels use a slot that has no pin.
        num_evictions: slots taken from a block since the last `clear`.
        num_on_host: blocks with a valid host copy.
        clock: number of the step.
        lifetime_steps: of evicted blocks, steps from getting the slot to losing it.
        idle_steps: of evicted blocks, steps since a request last read them.
    """

    def __init__(self, geometry: Geometry) -> None:
        groups, blocks, slots = geometry.num_groups, geometry.num_logical_blocks, geometry.num_slots
        self._geometry = geometry
        self.lut: IntArray = np.empty((groups, blocks), np.int32)
        self.host_valid: BoolArray = np.empty(blocks, np.bool_)
        self.pins: IntArray = np.empty((groups, slots), np.int32)
        self.last_read = np.zeros((groups, slots), np.int64)
        self._owner: IntArray = np.empty((groups, slots), np.int32)
        self._held_since = np.empty((groups, slots), np.int64)
        self._idle = [IdleQueue(slots) for _ in range(groups)]
        # Counted as they change: they are asked for in every step, and the tables are long.
        self._counts = np.zeros((groups, 2), np.int64)
        self._num_used, self._num_pinned = self._counts.T
        self.clock = 0
        self.lifetime_steps, self.idle_steps = Histogram(STEP_BOUNDS), Histogram(STEP_BOUNDS)
        self.clear()

    def clear(self) -> None:
        """Forget all content; arrays stay where they are, and what is known of evicted blocks and of time, too."""
        self.lut[:] = NOT_RESIDENT
        self.lut[:, NULL_BLOCK] = NULL_SLOT
        self.host_valid[:] = False
        self.pins[:] = 0
        self.last_read[:] = self.clock
        self._owner[:] = NO_OWNER
        for idle in self._idle:
            idle.fill()
        self._counts[:] = 0
        self.num_evictions = 0
        self.num_on_host = 0

    def arrays(self, group: int) -> SlotArrays:
        """What is known of a group, live; for loops that do what methods do."""
        tables = (self.lut, self.pins, self.last_read, self._owner, self._held_since, self._counts)
        lut, pins, last_read, owner, held_since, counts = (table[group] for table in tables)
        queued = self._idle[group].arrays
        return SlotArrays(lut, self.host_valid, pins, last_read, owner, held_since, counts, *queued)

    def begin_step(self) -> None:
        """Advance the clock, which tells how long a slot has rested."""
        self.clock += 1

    def is_resident(self, group: int, blocks: IntArray) -> BoolArray:
        """Which of the blocks have a slot, where this step may read them; bool `[n]`."""
        has_slot: BoolArray = self.lut[group, blocks] != NOT_RESIDENT
        return has_slot

    def spare(self, group: int) -> int:
        """Slots that are free or hold an unpinned block."""
        return int(self._geometry.num_slots - 1 - self._num_pinned[group])

    def used(self, group: int) -> int:
        """Slots that hold a block."""
        return int(self._num_used[group])

    def free(self, group: int) -> IntArray:
        """int32 `[num_free]` slots that hold no block, in ascending order."""
        return np.flatnonzero(self._owner[group, 1:] == NO_OWNER).astype(np.int32) + 1

    def demand(self, group: int, blocks: IntArray) -> int:
        """Spare slots that `hold` would take: one for each block that is not resident or not pinned."""
        slots = self.lut[group, blocks]
        return int(np.count_nonzero((slots == NOT_RESIDENT) | (self.pins[group, slots] == 0)))

    def pin(self, group: int, blocks: IntArray) -> None:
        """Claim resident blocks, several times if they are given several times."""
        slots, pins = self._slots_of(group, blocks), self.pins[group]
        idle = distinct(slots[pins[slots] == 0])
        self._num_pinned[group] += idle.size
        self._idle[group].remove(idle)
        np.add.at(pins, slots, 1)

    def unpin(self, group: int, blocks: IntArray) -> None:
        """Give up claims, several on a block if it is given several times.

        Blocks that nobody claims any more become cache. The step before this one was the last that read them.
        """
        slots, pins = self._slots_of(group, blocks), self.pins[group]
        np.subtract.at(pins, slots, 1)
        left = pins[slots]
        if left.size and left.min() < 0:
            raise IntegrityError(f"group {group}: blocks {blocks[left < 0]} have no pin to give up")
        idle, last_read = distinct(slots[left == 0]), self.last_read[group]
        self._num_pinned[group] -= idle.size
        last_read[idle] = np.maximum(last_read[idle], self.clock - 1)
        self._idle[group].add(idle)

    def touch(self, group: int, blocks: IntArray) -> None:
        """Note that this step reads resident blocks: they are the last to be evicted, the first given first."""
        slots = self._slots_of(group, blocks)
        self.last_read[group, slots] = self.clock
        self._idle[group].add(slots[self.pins[group, slots] == 0])

    def hold_fresh(self, group: int, blocks: IntArray) -> Copies:
        """Give EMPTY blocks a slot and pin them: they become DIRTY once every group has done so.

        Raises:
            IntegrityError: a block has content, or there is no room.
        """
        stale = self.host_valid[blocks] | (self.lut[group, blocks] != NOT_RESIDENT)
        if stale.any():
            raise IntegrityError(f"group {group}: blocks {blocks[stale]} are to be written but hold other content")
        return self._hold(group, blocks, blocks)

    def hold(self, group: int, blocks: IntArray) -> Copies:
        """Pin blocks and give those without a slot one; their content is to be copied from the host.

        Returns:
            The blocks that had no slot, with their new slots.

        Raises:
            IntegrityError: a block has neither a slot nor a valid host copy, or there is no room.
        """
        missing = blocks[self.lut[group, blocks] == NOT_RESIDENT]
        self.require_host_copy(missing)
        return self._hold(group, blocks, missing)

    def claim(self, group: int, blocks: IntArray) -> tuple[IntArray, Copies]:
        """As `hold` for blocks that may be given several times, each time with a pin of its own.

        Returns:
            int32 `[n]` slots of the blocks, and those that had none.
        """
        once = distinct(blocks)
        copies = self.hold(group, once)
        slots = self.lut[group, blocks]
        if once.size < blocks.size:
            np.add.at(self.pins[group], slots, 1)
            self.pins[group, self.lut[group, once]] -= 1
        return slots, copies

    def mark_written_back(self, blocks: IntArray) -> None:
        """DIRTY blocks have a host copy now and are CLEAN."""
        self.num_on_host += blocks.size
        self.host_valid[blocks] = True

    def drop(self, blocks: IntArray) -> None:
        """Make blocks EMPTY in every group: their content is worth nothing any more.

        Raises:
            IntegrityError: a request still claims one of them.
        """
        self.num_on_host -= int(np.count_nonzero(self.host_valid[blocks]))
        self.host_valid[blocks] = False
        for group in range(self._geometry.num_groups):
            resident = blocks[self.lut[group, blocks] != NOT_RESIDENT]
            if not resident.size:  # mostly: blocks that are given out anew
                continue
            slots = self._slots_of(group, resident)
            if self.pins[group, slots].any():
                raise IntegrityError(
                    f"group {group}: blocks {resident[self.pins[group, slots] > 0]} get new content "
                    "but are in the resident set of a known request"
                )
            self._release(group, slots)

    def require_host_copy(self, blocks: IntArray) -> None:
        """Raise IntegrityError unless all blocks have a valid host copy."""
        if not self.host_valid[blocks].all():
            lost = blocks[~self.host_valid[blocks]]
            raise IntegrityError(f"blocks {lost} are to be read but have neither a slot nor a valid host copy")

    def check_integrity(self) -> None:
        """Check the conservation laws of slots and content; costs a pass over all tables.

        Raises:
            IntegrityError: with the group and the numbers that do not add up.
        """
        for group in range(self._geometry.num_groups):
            check_group(group, self.arrays(group), self._idle[group].live())
        resident_in = (self.lut[:, 1:] != NOT_RESIDENT).sum(axis=0)
        partial = ~self.host_valid[1:] & (resident_in % self._geometry.num_groups != 0)
        if partial.any():
            raise IntegrityError(
                f"blocks {np.flatnonzero(partial) + 1} have no host copy and slots in some but not all groups"
            )
        if self.host_valid[NULL_BLOCK]:
            raise IntegrityError("the null block has a host copy")
        num_on_host = np.count_nonzero(self.host_valid)
        if num_on_host != self.num_on_host:
            raise IntegrityError(f"{num_on_host} blocks have a host copy, {self.num_on_host} are counted")

    def _slots_of(self, group: int, blocks: IntArray) -> IntArray:
        slots: IntArray = self.lut[group, blocks]
        if slots.size and slots.min() <= NULL_SLOT:
            raise IntegrityError(f"group {group}: blocks {blocks[slots <= NULL_SLOT]} have no slot")
        return slots

    def _hold(self, group: int, blocks: IntArray, missing: IntArray) -> Copies:
        # Pinned first, so that making room for some does not evict others of them.
        if missing.size < blocks.size:
            self.pin(group, blocks[self.lut[group, blocks] != NOT_RESIDENT])
        slots = self._take(group, missing.size)
        # Newest step whose kernels may still use one of them; this one's come later in any case
        last_read = min(int(self.last_read[group, slots].max(initial=0)), self.clock - 1)
        self._owner[group, slots] = missing
        self._held_since[group, slots] = self.clock
        self.lut[group, missing] = slots
        self.pins[group, slots] = 1
        self._num_pinned[group] += missing.size
        self._num_used[group] += missing.size
        return Copies(group, missing, slots, self.clock - 1 - last_read)

    def _take(self, group: int, count: int) -> IntArray:
        """Slots that have rested longest, out of the queue; what they held is evicted."""
        spare = self.spare(group)
        if count > spare:
            raise IntegrityError(
                f"group {group}: {count} slots are needed, but of {self._geometry.num_slots - 1} slots "
                f"{self._num_pinned[group]} are pinned and {spare} spare"
            )
        slots = self._idle[group].take(count)
        evicted = slots[self._owner[group, slots] != NO_OWNER]
        if evicted.size:
            self.require_host_copy(self._owner[group, evicted])
            ages = (self.clock - self.last_read[group, evicted], self.clock - self._held_since[group, evicted])
            self.note_evicted(*(of_each.astype(np.float64) for of_each in ages))
            self._release(group, evicted)
        return slots

    def note_evicted(self, idle: DoubleArray, lifetime: DoubleArray) -> None:
        """Blocks have lost their slots: float64 `[n]` steps since each was read, and since it got its slot."""
        self.idle_steps.observe(idle)
        self.lifetime_steps.observe(lifetime)
        self.num_evictions += idle.size

    def _release(self, group: int, slots: IntArray) -> None:
        self.lut[group, self._owner[group, slots]] = NOT_RESIDENT
        self._owner[group, slots] = NO_OWNER
        self._num_used[group] -= slots.size
