"""Every test that the page on reliability names is there, under that name, in that file."""

import re
from collections.abc import Iterator

import pytest

from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "reliability.md"
# A file and a test of it, or a further test of the file named before
NAMED = re.compile(r"`(?:(tests/[\w/]+\.py)::)?(test_\w+)`")


def named() -> Iterator[tuple[str, str]]:
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        file = ""
        for path, name in NAMED.findall(line):
            file = path or file
            yield file, name


@pytest.mark.parametrize(("file", "name"), sorted(set(named())))
def test_it_is_there(file: str, name: str) -> None:
    assert file, f"{name} is named without its file"
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_some_are_named() -> None:
    assert len(set(named())) > 10
