"""The slots of one layer group that nobody claims, in the order in which they were last of use."""

from __future__ import annotations

import numpy as np

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.types import BoolArray, IntArray, LongArray

NOT_QUEUED = -1


class IdleQueue:
    """A queue in which a slot stands once. Who joins again, or leaves from the middle, leaves a stale entry behind.

    Args:
        num_slots: S. Slot 0, the null slot, is never in the queue.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        # Entries between `head` and `tail`, each with its stamp; live while the slot has the same one.
        self._slots: IntArray = np.empty(4 * num_slots, np.int32)
        self._stamps = np.empty(4 * num_slots, np.int64)
        self._stamp_of = np.empty(num_slots, np.int64)
        # Head, tail and the newest stamp
        self._ends = np.zeros(3, np.int64)
        self.fill()

    @property
    def arrays(self) -> tuple[IntArray, LongArray, LongArray, LongArray]:
        """Entries int32 `[n]`, their stamps and those of slots, and head, tail and newest stamp; live."""
        return self._slots, self._stamps, self._stamp_of, self._ends

    def fill(self) -> None:
        """Queue every slot, the lowest first."""
        self._ends[:2] = 0
        self._stamp_of[:] = NOT_QUEUED
        self.add(np.arange(1, self._num_slots, dtype=np.int32))

    def add(self, slots: IntArray) -> None:
        """Put slots, int32 `[n]` without repetition, at the end, the first of them first."""
        head, tail, stamp = self._ends.tolist()
        if tail + slots.size > self._slots.size:
            live = self._is_live(head, tail)
            kept = int(np.count_nonzero(live))
            self._slots[:kept] = self._slots[head:tail][live]
            self._stamps[:kept] = self._stamps[head:tail][live]
            head, tail = 0, kept
        end = tail + slots.size
        self._slots[tail:end], self._stamps[tail:end] = slots, stamp + 1
        self._stamp_of[slots] = stamp + 1
        self._ends[:] = head, end, stamp + 1

    def remove(self, slots: IntArray) -> None:
        """Take slots out, wherever they stand."""
        self._stamp_of[slots] = NOT_QUEUED

    def take(self, count: int) -> IntArray:
        """The first slots, int32 `[count]`, out of the queue.

        Raises:
            IntegrityError: there are fewer.
        """
        parts: list[IntArray] = []
        missing, (head, tail) = count, self._ends[:2].tolist()
        while missing:
            if head == tail:
                raise IntegrityError(f"{count} idle slots are asked for, {count - missing} are queued")
            end = min(tail, head + missing)
            parts.append(self._slots[head:end][self._is_live(head, end)])
            self._ends[0] = head = end
            missing -= parts[-1].size
        taken = np.concatenate(parts) if parts else np.empty(0, np.int32)
        self.remove(taken)
        return taken

    def live(self) -> IntArray:
        """int32 `[n]` all slots that are queued, the first one first."""
        head, tail = self._ends[:2].tolist()
        return self._slots[head:tail][self._is_live(head, tail)]

    def _is_live(self, start: int, end: int) -> BoolArray:
        live: BoolArray = self._stamp_of[self._slots[start:end]] == self._stamps[start:end]
        return live
