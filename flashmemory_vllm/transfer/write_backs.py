"""Which write-backs are under way, so that only what touches their blocks or slots waits for them."""

from __future__ import annotations

from collections import deque

import numpy as np

from flashmemory_vllm.transfer.engine import Ids, Marker


class PendingWriteBacks:
    """The write-backs that may not be done, found by the blocks they write and the slots they read.

    Each write-back gets the next number, and each block and slot remembers the last one that touched it. They land
    one after the other: who waits for the newest of several write-backs has waited for all of them.

    Args:
        num_groups: G.
        num_blocks: N, blocks of the host pool.
        num_slots: S.
    """

    def __init__(self, num_groups: int, num_blocks: int, num_slots: int) -> None:
        self._last_writer = np.zeros((num_groups, num_blocks), np.int64)
        self._last_reader = np.zeros((num_groups, num_slots), np.int64)
        self._markers: deque[Marker] = deque()
        # Number of the newest write-back that is done; those of `_markers` follow it.
        self._num_done = 0

    def __len__(self) -> int:
        self._prune()
        return len(self._markers)

    def add(self, group: int, blocks: Ids, slots: Ids, landed: Marker) -> None:
        """Remember a write-back that has been enqueued behind all others.

        Args:
            group: its layer group.
            blocks: [n] host blocks that it writes.
            slots: [n] slots that it reads.
            landed: right behind it, and so behind all before.
        """
        self._prune()
        self._markers.append(landed)
        number = self._num_done + len(self._markers)
        self._last_writer[group, blocks] = number
        self._last_reader[group, slots] = number

    def writing(self, group: int, blocks: Ids) -> Marker | None:
        """What to wait for before host blocks are read. None if no pending write-back writes them."""
        return self._newest(self._last_writer[group], blocks)

    def reading(self, group: int, slots: Ids) -> Marker | None:
        """What to wait for before slots are overwritten. None if no pending write-back reads them."""
        return self._newest(self._last_reader[group], slots)

    def _newest(self, last: np.ndarray[tuple[int], np.dtype[np.int64]], ids: Ids) -> Marker | None:
        self._prune()
        if not self._markers or not len(ids):
            return None
        place = int(last[ids].max()) - self._num_done
        return self._markers[place - 1] if place > 0 else None

    def _prune(self) -> None:
        while self._markers and self._markers[0].query():
            self._markers.popleft()
            self._num_done += 1
