"""One deliberate bug."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Mutation:
    """A bug that somebody could make, and the test that finds it.

    Attributes:
        bug: what goes wrong, in words; the bug's name.
        path: file, from the root of the checkout.
        before: text of the file that is replaced; occurs once.
        after: text in its place.
        test: id of the test that fails then, and without it passes.
    """

    bug: str
    path: str
    before: str
    after: str
    test: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What a result is good for: the same bug, file and test."""
        return self.bug, self.path, self.test

    def apply(self, root: Path) -> None:
        """Plant the bug in a copy of the checkout.

        Raises:
            ValueError: the text to replace does not occur exactly once.
        """
        file = root / self.path
        source = file.read_text(encoding="utf-8")
        count = source.count(self.before)
        if count != 1:
            raise ValueError(f"{self.bug!r}: {self.path} has {count} times {self.before!r}, allowed is once")
        file.write_text(source.replace(self.before, self.after), encoding="utf-8")
