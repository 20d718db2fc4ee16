"""Texts of one's own as windows of token ids: what the suite `loss` reads."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from flashmemory_vllm.errors import ConfigError

JSON_LINES = {".jsonl", ".ndjson"}
FIELD = "text"


def read_texts(paths: Sequence[Path]) -> list[str]:
    """The documents of some files: a JSON-lines file has one a line, in its field `text`; any other file is one.

    Args:
        paths: UTF-8 files.

    Raises:
        ConfigError: a file cannot be read, or a line has no such field.
    """
    texts: list[str] = []
    for path in paths:
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--texts: {path} ({error}) is given; allowed are files of UTF-8 text") from error
        texts += _lines(path, content) if path.suffix in JSON_LINES else [content]
    return texts


def fingerprint(texts: Sequence[str]) -> str:
    """Hexadecimal SHA-256 of some documents in order: equal where the same ones were read."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def windows(texts: Sequence[str], encode: Callable[[str], list[int]], tokens: int, count: int) -> list[list[int]]:
    """Windows of text that do not overlap, evenly over all that there are.

    What the tokenizer puts before every text (a token that begins it) begins every window.

    Args:
        texts: documents.
        encode: text to token ids, with the tokens that the model expects around them.
        tokens: of each window.
        count: windows.

    Returns:
        `[count][tokens]` token ids.

    Raises:
        ConfigError: the documents have fewer windows.
    """
    found = [window for of_one in windows_by_text(texts, encode, tokens) for window in of_one]
    if len(found) < count:
        raise ConfigError(
            f"--documents is {count}, but --texts has {len(found)} windows of {tokens:,} tokens; allowed are as many "
            "as it has"
        )
    return [found[index * len(found) // count] for index in range(count)]


def windows_by_text(texts: Sequence[str], encode: Callable[[str], list[int]], tokens: int) -> Iterator[list[list[int]]]:
    """All windows of each document, see `windows`; what is left of one is dropped."""
    head = common_start(encode("a"), encode("b"))
    length = tokens - len(head)
    for text in texts:
        body = encode(text)[len(head) :]
        yield [head + body[at : at + length] for at in range(0, len(body) - length + 1, length)]


def common_start(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """Tokens that both begin with: of two texts that begin differently, what the tokenizer puts before each."""
    same = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return list(one[:same])


def json_lines(content: str) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line that is not blank.

    Lines of JSON end with a line feed alone: what else ends lines for Python (U+2028, U+0085) may stand in a string.
    """
    return ((number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip())


def _lines(path: Path, content: str) -> list[str]:
    texts = []
    for number, line in json_lines(content):
        try:
            text = json.loads(line)[FIELD]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ConfigError(
                f"--texts: line {number} of {path} is given; allowed are objects with a string in the field "
                f"{FIELD!r}, one a line"
            )
        texts.append(text)
    return texts
