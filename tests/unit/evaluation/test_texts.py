"""Texts become windows that do not overlap, of exactly the tokens asked for."""

import json
from pathlib import Path

import pytest

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.texts import fingerprint, read_texts, windows

BOS = 1


def encode(text: str) -> list[int]:
    return [BOS, *map(ord, text)]


def test_a_file_is_a_document_and_a_json_line_is_one(tmp_path: Path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("one\ntwo\n")
    lines.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in ("three", "vier \u00e9")) + "\n\n")
    assert read_texts([plain, lines]) == ["one\ntwo\n", "three", "vier \u00e9"]


def test_a_json_line_ends_with_a_line_feed_and_with_nothing_else(tmp_path: Path) -> None:
    """As `json.dumps(..., ensure_ascii=False)` writes what web pages hold."""
    texts = ["a\u2028b", "c\u0085d\u2029"]
    path = tmp_path / "b.jsonl"
    path.write_text("\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), encoding="utf-8")
    assert read_texts([path]) == texts


@pytest.mark.parametrize("line", ["{", "[1]", '{"content": "x"}', '{"text": 3}'])
def test_a_line_without_a_text_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(ConfigError, match=r"--texts: line 2 of .*b\.jsonl is given; allowed are objects"):
        read_texts([path])


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ConfigError, match=r"--texts: .*model\.bin .* is given; allowed are files of UTF-8 text"):
        read_texts([path])


def test_windows_do_not_overlap_and_begin_as_every_text_does() -> None:
    texts = ["abcdefgh", "ijk", "lmnopqrs"]
    found = windows(texts, encode, tokens=4, count=4)
    assert [window[0] for window in found] == [BOS] * 4
    assert ["".join(map(chr, window[1:])) for window in found] == ["abc", "def", "ijk", "lmn"]
    (first, last) = windows(texts, encode, tokens=4, count=2)
    assert ("".join(map(chr, first[1:])), "".join(map(chr, last[1:]))) == ("abc", "ijk")


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--documents is 3, but --texts has 2 windows of 4 tokens"):
        windows(["abcdefgh"], encode, tokens=4, count=3)


def test_the_same_documents_have_the_same_fingerprint() -> None:
    assert fingerprint(["ab", "c"]) == fingerprint(["ab", "c"])
    assert len({fingerprint(texts) for texts in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["ab"])}) == 4
