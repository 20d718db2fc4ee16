"""Fences of a transfer engine that nobody has, for who asks which of them were late."""

from __future__ import annotations


class FencesTwin:
    """Counts fences; those that are said to be late are told of at once."""

    def __init__(self) -> None:
        self.num_fences = 0
        self.late: list[int] = []

    def fence(self) -> None:
        """A step passes its fence."""
        self.num_fences += 1

    def take_late_fences(self) -> list[int]:
        """As the engine's."""
        taken, self.late = self.late, []
        return taken
