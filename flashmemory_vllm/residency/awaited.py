"""What the tables of decoding requests lack while a step is planned, and what brings it."""

from __future__ import annotations

from typing import NamedTuple

from flashmemory_vllm.residency.types import Copies, IntArray, joined


class Taken(NamedTuple):
    """The copies of a step, for each group that has any.

    Attributes:
        fresh: blocks that are begun: nothing to copy.
        recalls: of requests that begin to decode, or whose list is applied at once.
        prefetches: of all other lists.
    """

    fresh: list[Copies]
    recalls: list[Copies]
    prefetches: list[Copies]


class Awaited:
    """Blocks of tables that get their slots at the end of a step."""

    def __init__(self) -> None:
        self._parts: list[tuple[IntArray, IntArray]] = []

    def add(self, place: IntArray, position: IntArray) -> None:
        """More of them, int32 `[n]` each."""
        self._parts.append((place, position))

    def take(self) -> tuple[IntArray, IntArray]:
        """Places and positions of all of them, int32 `[n]` each; none are left."""
        parts, self._parts = self._parts, []
        if len(parts) == 1:
            return parts[0]
        return joined([place for place, _ in parts]), joined([position for _, position in parts])
