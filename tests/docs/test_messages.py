"""Messages that the troubleshooting page quotes are those of the code."""

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from flashmemory_vllm.config import SECTION
from tests.docs.pages import DOCS, ROOT, code_blocks

PAGE = DOCS / "troubleshooting.md"
QUOTES = [block.text for block in code_blocks(PAGE) if block.language == "text"]
ELLIPSIS = "…"


@cache
def _texts() -> list[str]:
    """Every text in the package, with an ellipsis for what an f-string puts in."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "flashmemory_vllm").rglob("*.py"))
    return [text for tree in trees for node in ast.walk(tree) for text in _text_of(node)]


def _text_of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(map(_part, node.values))


def _part(part: ast.expr) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    is_section = isinstance(part, ast.FormattedValue) and ast.unparse(part.value) == "SECTION"
    return SECTION if is_section else ELLIPSIS


def _is_said(quote: str) -> bool:
    pattern = re.compile(".*".join(map(re.escape, quote.strip().split(ELLIPSIS))))
    return any(pattern.search(text) for text in _texts())


def test_the_page_quotes_messages() -> None:
    assert len(QUOTES) >= 15


@pytest.mark.parametrize("quote", QUOTES)
def test_the_code_says_what_the_page_quotes(quote: str) -> None:
    assert _is_said(quote)


@pytest.mark.parametrize("quote", ["the flux capacitor is empty", "flashmemory.host_memory_gib: … given, allowed: any"])
def test_a_message_that_nobody_prints_is_found(quote: str) -> None:
    assert not _is_said(quote)
