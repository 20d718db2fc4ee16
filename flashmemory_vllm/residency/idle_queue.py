"""The slots of one layer group that nobody claims, in the order in which they were last of use."""

from __future__ import annotations

import numpy as np

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.types import BoolArray, IntArray

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
        self._stamp = 0
        self._head = self._tail = 0
        self.fill()

    def fill(self) -> None:
        """Queue every slot, the lowest first."""
        self._head = self._tail = 0
        self._stamp_of[:] = NOT_QUEUED
        self.add(np.arange(1, self._num_slots, dtype=np.int32))

    def add(self, slots: IntArray) -> None:
        """Put slots, int32 `[n]` without repetition, at the end, the first of them first."""
        if self._tail + slots.size > self._slots.size:
            live = self._is_live(self._head, self._tail)
            kept = int(np.count_nonzero(live))
            self._slots[:kept] = self._slots[self._head : self._tail][live]
            self._stamps[:kept] = self._stamps[self._head : self._tail][live]
            self._head, self._tail = 0, kept
        self._stamp += 1
        end = self._tail + slots.size
        self._slots[self._tail : end], self._stamps[self._tail : end] = slots, self._stamp
        self._stamp_of[slots] = self._stamp
        self._tail = end

    def remove(self, slots: IntArray) -> None:
        """Take slots out, wherever they stand."""
        self._stamp_of[slots] = NOT_QUEUED

    def take(self, count: int) -> IntArray:
        """The first slots, int32 `[count]`, out of the queue.

        Raises:
            IntegrityError: there are fewer.
        """
        parts: list[IntArray] = []
        missing = count
        while missing:
            if self._head == self._tail:
                raise IntegrityError(f"{count} idle slots are asked for, {count - missing} are queued")
            end = min(self._tail, self._head + missing)
            parts.append(self._slots[self._head : end][self._is_live(self._head, end)])
            self._head = end
            missing -= parts[-1].size
        taken = np.concatenate(parts) if parts else np.empty(0, np.int32)
        self.remove(taken)
        return taken

    def live(self) -> IntArray:
        """int32 `[n]` all slots that are queued, the first one first."""
        return self._slots[self._head : self._tail][self._is_live(self._head, self._tail)]

    def _is_live(self, start: int, end: int) -> BoolArray:
        live: BoolArray = self._stamp_of[self._slots[start:end]] == self._stamps[start:end]
        return live
