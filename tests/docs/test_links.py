"""Every link between pages leads somewhere, and every page is in the site."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.pages import DOCS, PAGES, ROOT, anchors, links


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _pages_in(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        yield from _pages_in(list(nav.values()))
    else:
        for entry in nav:
            yield from _pages_in(entry)


def _is_broken(page: Path, target: str, anchor: str) -> bool:
    path = page if not target else page.parent / target
    if not path.exists() or (page.is_relative_to(DOCS) and not path.resolve().is_relative_to(DOCS)):
        return True
    return bool(anchor) and anchor not in anchors(path)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_link_leads_to_a_file_and_a_heading_of_it(page: Path) -> None:
    broken = [f"{target}#{anchor}" for target, anchor in links(page) if _is_broken(page, target, anchor)]
    assert broken == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One\n\n[a](#one) [b](#two) [c](gone.md) [d](https://example.org/gone)\n\n```text\n[e](no)\n```\n"
    )
    assert [pair for pair in links(page) if _is_broken(page, *pair)] == [("", "two"), ("gone.md", "")]


def test_the_navigation_has_every_page_once() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(_pages_in(nav)) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
