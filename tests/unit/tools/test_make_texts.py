"""Texts are made of what a reader would see, long enough, each once, and the same from the same folders."""

from pathlib import Path

import pytest

from flashmemory_vllm.evaluation.texts import read_texts
from tests.tools.make_texts import main, text_of


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a/page.rst.txt", "Title\n=====\n", "Title\n====="),
        ("page.md", "# Title", "# Title"),
        ("x.dist-info/METADATA", "Name: x\nVersion: 1\n\nIt does\n\nthings.", "It does\n\nthings."),
        (
            "page.html",
            "<html><head><title>no</title></head><script>a < b</script><p>One &lt; <b>two</b>.<p>Three",
            "One < two.\nThree",
        ),
        ("LICENSE.txt", "As is", None),
        ("module.py", "code", None),
    ],
)
def test_what_a_file_tells(name: str, content: str, text: str | None) -> None:
    assert text_of(Path(name), content) == text


def test_short_files_of_a_folder_are_joined_and_what_is_left_is_dropped(tmp_path: Path) -> None:
    root, out = tmp_path / "docs", tmp_path / "texts.jsonl"
    files = {
        "book/1.md": "a" * 40,
        "book/2.md": "b" * 70,
        "book/3.md": "left over",
        "book/sub/4.md": "c" * 120,
        "other/copy.md": "c" * 120,
        "other/module.py": "d" * 500,
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    assert main([str(out), str(root), "--characters", "100"]) == 0
    assert read_texts([out]) == ["a" * 40 + "\n\n" + "b" * 70, "c" * 120]
    again = tmp_path / "again.jsonl"
    assert main([str(again), str(root), "--characters", "100"]) == 0
    assert again.read_bytes() == out.read_bytes()
    longer = tmp_path / "longer.jsonl"
    assert main([str(longer), str(out), "--characters", "200"]) == 0
    assert read_texts([longer]) == ["a" * 40 + "\n\n" + "b" * 70 + "\n\n" + "c" * 120]


def test_nothing_to_read_is_an_error_and_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "out.jsonl"), str(tmp_path)]) == 1
    assert "no documentation" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
