"""A report as a list of blocks, written as Markdown with pictures beside it or as one HTML file that holds them."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .8rem; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #999; }
td { overflow-wrap: anywhere; }
img { max-width: 100%; }
h2 { margin-top: 2.5rem; }
.pass { color: #17693a; font-weight: 600; }
.fail { color: #a61b1b; font-weight: 600; }
""".strip()


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading of level 1, 2 or 3."""

    level: int
    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """One paragraph of plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """Cells of plain text, as many in each row as the header has."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG file with what it shows in words."""

    path: Path
    shows: str


Block = Heading | Text | Table | Picture


def to_markdown(blocks: Sequence[Block]) -> str:
    """Write Markdown; pictures are named relative to the folder that they and the report lie in."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """Write one HTML file that loads nothing: pictures are in it, and there are no scripts."""
    body = "\n".join(map(_html, blocks))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>\n{_STYLE}\n</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Picture):
        return f"![{block.shows}]({block.path.name})"
    lines = [block.header, ["---"] * len(block.header), *block.rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Picture):
        data = base64.b64encode(block.path.read_bytes()).decode()
        return f'<p><img alt="{html.escape(block.shows)}" src="data:image/png;base64,{data}"></p>'
    head = "".join(f"<th>{html.escape(name)}</th>" for name in block.header)
    rows = "\n".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in block.rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"


def _html_cell(text: str) -> str:
    mark = f' class="{text}"' if text in {"pass", "fail"} else ""
    return f"<td{mark}>{html.escape(text)}</td>"
