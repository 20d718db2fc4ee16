"""Texts from documentation that packages install, for `flashmemory eval --suites loss` and `flashmemory capture`.

    python -m tests.tools.make_texts OUT.jsonl FOLDER ... [--characters 40000]
    python -m tests.tools.make_texts LONG.jsonl OUT.jsonl --characters 120000

A line of `OUT.jsonl` is one document, `{"text": ..., "source": ...}`. Folders are searched for reStructuredText,
Markdown, HTML and the long descriptions of Python packages (`METADATA`): an environment's `site-packages`, or an
unpacked package of Debian's, as of

    apt-get download python3.11-doc debian-handbook
    for package in *.deb; do dpkg -x "$package" unpacked; done

Files that are too short are joined with those beside them, in the order of their names, as the chapters of a book are;
so are documents of a file that was made before.
The same folders make the same file. Whose texts they are their packages tell; they are not to be committed.
"""

import argparse
import html
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from flashmemory_vllm.files import write_text

_MARKUP = {".rst", ".md"}
_PAGES = {".html", ".htm"}
_DESCRIPTION = "METADATA"
_UNREAD = re.compile(r"<(script|style|head|nav)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_BREAK = re.compile(r"<(?:p|div|h\d|li|tr|pre|br|dt|dd|section)\b[^>]*>", re.IGNORECASE)
_TAG = re.compile(r"<[^>]*>")


def text_of(path: Path, content: str) -> str | None:
    """What a file tells a reader; None if it is no documentation.

    Args:
        path: names the kind of the file.
        content: of the file.
    """
    # Sphinx keeps the source of a page as page.rst.txt
    suffix = Path(path.stem).suffix if path.suffix == ".txt" else path.suffix
    if path.name == _DESCRIPTION:
        # Headers end with an empty line
        return content.partition("\n\n")[2].strip()
    if suffix in _MARKUP:
        return content.strip()
    if path.suffix in _PAGES:
        bare = html.unescape(_TAG.sub("", _BREAK.sub("\n", _UNREAD.sub(" ", content))))
        return re.sub(r"\n\s*\n+", "\n\n", re.sub(r"[ \t]+", " ", bare)).strip()
    return None


def documents(folders: Sequence[Path], characters: int) -> Iterator[tuple[str, str]]:
    """Texts of at least so many characters, and where each begins, relative to its folder.

    A text that was met before, as of a package that another one brings along, is left out.

    Args:
        folders: searched in their order; or files that this wrote.
        characters: of a document, at least; what is left of a folder that has fewer is dropped.
    """
    known: set[str] = set()
    for root in folders:
        if root.is_file():
            lines = map(json.loads, root.read_text(encoding="utf-8").splitlines())
            yield from _joined(((line["source"], line["text"]) for line in lines), characters)
            continue
        # In the order of whole paths the files of one folder need not lie together
        files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
        for _, group in groupby(sorted(files, key=lambda path: path.parent), key=lambda path: path.parent):
            yield from _joined(_new_texts(group, root, known), characters)


def _new_texts(files: Iterable[Path], root: Path, known: set[str]) -> Iterator[tuple[str, str]]:
    """Names relative to `root` and texts of what can be read and is not yet known; it is then."""
    for path in files:
        text = _read(path)
        if text and text not in known:
            known.add(text)
            yield path.relative_to(root).as_posix(), text


def _joined(texts: Iterable[tuple[str, str]], characters: int) -> Iterator[tuple[str, str]]:
    """Texts one behind the other until they have so many characters, with the name of the first."""
    kept: list[str] = []
    first = ""
    for source, text in texts:
        first = first if kept else source
        kept.append(text)
        if sum(map(len, kept)) >= characters:
            yield first, "\n\n".join(kept)
            kept = []


def _read(path: Path) -> str | None:
    """The text of a file of a known kind, which need not be UTF-8 throughout."""
    if path.name != _DESCRIPTION and path.suffix not in {*_MARKUP, *_PAGES, ".txt"}:
        return None
    return text_of(path, path.read_text(encoding="utf-8", errors="replace"))


def main(words: Sequence[str]) -> int:
    """Write the file that the words name."""
    parser = argparse.ArgumentParser(description="texts from documentation that packages install")
    parser.add_argument("out", type=Path, help="file of JSON lines")
    parser.add_argument("folders", type=Path, nargs="+", help="searched for documentation")
    parser.add_argument("--characters", type=int, default=40_000, help="of a document, at least. Default: 40000")
    args = parser.parse_args(words)
    found = list(documents(args.folders, args.characters))
    if not found:
        named = ", ".join(map(str, args.folders))
        sys.stderr.write(f"no documentation of {args.characters:,} characters in {named}: allowed are other folders\n")
        return 1
    write_text(args.out, "".join(json.dumps({"text": text, "source": source}) + "\n" for source, text in found))
    characters = sum(len(text) for _, text in found)
    sys.stdout.write(f"{len(found)} documents, {characters:,} characters in {args.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
