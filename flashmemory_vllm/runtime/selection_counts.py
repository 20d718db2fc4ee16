"""How many selections each request had, those before a preemption included."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashmemory_vllm.residency.types import IntArray


class SelectionCounts:
    """Counts by place; what a request had is kept until it is forgotten, wherever it comes back.

    Args:
        num_places: P.

    Attributes:
        counts: int32 `[P]` selections of each place's request, live.
    """

    def __init__(self, num_places: int) -> None:
        self.counts: IntArray = np.zeros(num_places, np.int32)
        self._place_of: dict[str, int] = {}
        self._name_at: dict[int, str] = {}
        self._elsewhere: dict[str, int] = {}

    def of(self, req_id: str) -> int:
        """Selections of a request."""
        place = self._place_of.get(req_id)
        return self._elsewhere.get(req_id, 0) if place is None else int(self.counts[place])

    def before(self, place: IntArray, new: Sequence[str]) -> IntArray:
        """Selections that requests had so far.

        Args:
            place: int32 `[n]` of each.
            new: names of the first of them, which may be others than those that had these places.
        """
        for req_id, own in zip(new, place.tolist(), strict=False):
            self._move(req_id, own)
        return self.counts[place]

    def count(self, place: IntArray) -> None:
        """One more for each of the places, all of them different."""
        self.counts[place] += 1

    def names(self) -> list[str]:
        """Everybody who is counted."""
        return [*self._place_of, *self._elsewhere]

    def forget(self, req_id: str) -> None:
        """Drop what a request had; unknown ids are fine."""
        self._elsewhere.pop(req_id, None)
        place = self._place_of.pop(req_id, None)
        if place is not None:
            del self._name_at[place]

    def _move(self, req_id: str, place: int) -> None:
        """A request goes on at a place, and who had it before is elsewhere."""
        num_selections = self.of(req_id)
        self.forget(req_id)
        before = self._name_at.get(place)
        if before is not None:
            self._elsewhere[before] = self.of(before)
            del self._place_of[before]
        self._place_of[req_id], self._name_at[place], self.counts[place] = place, req_id, num_selections
