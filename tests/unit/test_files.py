"""A file is there whole or not at all: on a full disk, after an error, and when it takes another one's place."""

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from flashmemory_vllm.errors import StorageError
from flashmemory_vllm.files import append_text, whole_file, write_json, write_text
from tests.helpers.disk import full_disk

FEW_BYTES = 4096


def write_tensors(path: Path) -> None:
    with whole_file(path) as partial:
        save_file({"a": np.zeros(FEW_BYTES)}, partial)


WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_text(path, "x" * 2 * FEW_BYTES),
    "json": lambda path: write_json(path, [0] * FEW_BYTES),
    "tensors": write_tensors,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "rows.json"
    path.write_text("before")
    with full_disk(FEW_BYTES), pytest.raises(StorageError, match=r"rows.json: cannot be written .*Make room"):
        write(path)
    assert [one.name for one in tmp_path.iterdir()] == ["rows.json"]
    assert path.read_text() == "before"
    write(path)
    assert path.stat().st_size > FEW_BYTES
    assert [one.name for one in tmp_path.iterdir()] == ["rows.json"]


def test_a_full_disk_takes_a_whole_line_or_none(tmp_path: Path) -> None:
    path, line = tmp_path / "lines.txt", "ö" * 999 + "\n"

    def append() -> None:
        for _ in range(9):
            append_text(path, line)

    with full_disk(FEW_BYTES), pytest.raises(StorageError, match=r"lines.txt: cannot be written .*Make room"):
        append()
    assert path.read_text() == 2 * line
    append_text(path, line)
    assert path.read_text() == 3 * line


def test_the_reason_is_the_systems_own(tmp_path: Path) -> None:
    def write() -> None:
        with whole_file(tmp_path / "a.txt") as partial:
            # What is written to this device meets a full disk
            partial.unlink()
            partial.symlink_to("/dev/full")
            partial.write_text("x" * 2 * FEW_BYTES)

    with pytest.raises(StorageError, match="No space left on device") as caught:
        write()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with whole_file(tmp_path / "a.txt") as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "rows.json.partial").symlink_to(precious)
    write_text(tmp_path / "rows.json", "rows")
    assert precious.read_text() == "mine"
    assert (tmp_path / "rows.json").read_text() == "rows"
    assert not (tmp_path / "rows.json").is_symlink()


@pytest.mark.parametrize("place", ["gone/rows.json", "file/rows.json", "folder"])
def test_room_is_asked_for_only_where_it_helps(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for write in (write_text, append_text):
        with pytest.raises(StorageError, match=r"cannot be written \(.*\); .* Name another place, or open this one$"):
            write(tmp_path / place, "rows")
