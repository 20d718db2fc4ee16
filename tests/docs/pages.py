"""Reads the pages a user reads: their code blocks, headings and links."""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
QUICK_START = DOCS / "quick-start.md"
PAGES = (README, *sorted(DOCS.rglob("*.md")))

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """One fenced block.

    Attributes:
        language: what follows the fence, may be empty.
        text: the lines in it.
    """

    language: str
    text: str


def code_blocks(page: Path) -> list[CodeBlock]:
    """The fenced blocks of a page, in order."""
    return [CodeBlock(*match.groups()) for match in _FENCED.finditer(page.read_text(encoding="utf-8"))]


def commands(page: Path) -> list[str]:
    """Every command of a page's shell blocks, without comments; a continued line is one command."""
    blocks = (block.text.replace("\\\n", " ") for block in code_blocks(page) if block.language == "bash")
    lines = (line.split("   #")[0].strip() for text in blocks for line in text.splitlines())
    return [" ".join(line.split()) for line in lines if line]


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Target, relative to the page's folder or empty for the page itself, and anchor of each link that stays here."""
    for target in _LINK.findall(_without_code(page)):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page may name, as GitHub and the site both make it."""
    return {_slug(heading) for heading in _HEADING.findall(_without_code(page))}


def _without_code(page: Path) -> str:
    return _FENCED.sub("", page.read_text(encoding="utf-8"))


def _slug(heading: str) -> str:
    ascii_only = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())
