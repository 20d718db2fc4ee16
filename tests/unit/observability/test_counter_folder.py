"""What a start and an end may touch: files that are provably ours and dead, in folders of this user, and no other."""

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.observability.counters import SCHEDULER, CounterReader, CounterWriter, worker_name

DYING_WRITER = """
import os, sys
from pathlib import Path
from flashmemory_vllm.observability.counters import CounterWriter
CounterWriter.create(Path(sys.argv[1]), sys.argv[2])
os._exit(0)
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "flashmemory-test-0"


def leave_dead_file(folder: Path, name: str = "worker-0") -> Path:
    """Let a process write a counter file and die without closing it."""
    subprocess.run([sys.executable, "-c", DYING_WRITER, str(folder), name], check=True)
    path = folder / f"{name}.bin"
    assert path.is_file()
    return path


def start(tmp_path: Path) -> None:
    """What every start of a worker does, beside all that lies in `tmp_path`."""
    CounterWriter.create(tmp_path / "flashmemory-started-0", worker_name(0)).close()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "worker-0.bin", "scheduler.bin", "worker-0.txt"])
def test_a_start_deletes_nothing_of_somebody_else(tmp_path: Path, name: str) -> None:
    staged = tmp_path / "flashmemory-weights"
    (staged / "tokenizer").mkdir(parents=True)
    for path in (staged / name, staged / "tokenizer" / "vocab.json"):
        path.write_bytes(b"weights" * 1000)
    start(tmp_path)
    assert (staged / name).read_bytes() == (staged / "tokenizer" / "vocab.json").read_bytes() == b"weights" * 1000


def test_an_empty_folder_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / "flashmemory-staging").mkdir()
    start(tmp_path)
    assert (tmp_path / "flashmemory-staging").is_dir()


def test_of_a_dead_engines_folder_only_its_counters_go(tmp_path: Path) -> None:
    dead = [leave_dead_file(tmp_path / "flashmemory-dead-0", name) for name in ("worker-0", SCHEDULER)]
    kept = tmp_path / "flashmemory-dead-0" / "notes.bin"
    kept.write_text("notes")
    start(tmp_path)
    assert not any(path.exists() for path in dead)
    assert kept.read_text() == "notes"


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content + b"\0",
        lambda content: content[:-1],
        lambda content: b"another " + content[8:],
        lambda content: content[:8] + b"another " + content[16:],
    ],
    ids=["longer", "shorter", "no magic", "another layout"],
)
def test_a_file_that_is_not_exactly_a_counter_file_stays(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    path = leave_dead_file(tmp_path / "flashmemory-dead-0")
    changed = change(path.read_bytes())
    path.write_bytes(changed)
    start(tmp_path)
    assert path.read_bytes() == changed


def test_no_link_is_followed(tmp_path: Path) -> None:
    dead = leave_dead_file(tmp_path / "elsewhere" / "flashmemory-dead-0")
    (tmp_path / "flashmemory-link-0").symlink_to(dead.parent, target_is_directory=True)
    (tmp_path / "flashmemory-links-0").mkdir()
    (tmp_path / "flashmemory-links-0" / "worker-0.bin").symlink_to(dead)
    start(tmp_path)
    assert dead.is_file()
    assert (tmp_path / "flashmemory-link-0").is_symlink()
    assert (tmp_path / "flashmemory-links-0" / "worker-0.bin").is_symlink()


def test_a_pipe_does_not_hold_up_a_start(tmp_path: Path) -> None:
    (tmp_path / "flashmemory-pipe-0").mkdir()
    os.mkfifo(tmp_path / "flashmemory-pipe-0" / "worker-0.bin")
    start(tmp_path)
    assert (tmp_path / "flashmemory-pipe-0" / "worker-0.bin").is_fifo()


def test_files_of_another_user_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = leave_dead_file(tmp_path / "flashmemory-dead-0")
    other = os.geteuid() + 1
    (tmp_path / "ours").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: other)
        with pytest.raises(IntegrityError, match="made by another user"):
            CounterWriter.create(tmp_path / "ours", worker_name(0))
    assert path.is_file()


def test_closing_leaves_what_is_not_ours(directory: Path) -> None:
    worker = CounterWriter.create(directory, worker_name(0))
    (directory / "notes.txt").write_text("notes")
    worker.close()
    assert [path.name for path in directory.iterdir()] == ["notes.txt"]


def test_closing_leaves_a_file_that_took_our_name(directory: Path) -> None:
    worker = CounterWriter.create(directory, worker_name(0))
    worker.path.unlink()
    worker.path.write_text("notes")
    worker.close()
    assert worker.path.read_text() == "notes"


def test_a_foreign_file_of_our_name_is_not_replaced(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    path = directory / "worker-0.bin"
    path.write_text("notes")
    with pytest.raises(IntegrityError, match=r"worker-0\.bin exists and is no counter file"):
        CounterWriter.create(directory, worker_name(0))
    assert [found.name for found in directory.iterdir()] == ["worker-0.bin"]
    assert path.read_text() == "notes"


def test_a_planted_link_is_not_written_through(tmp_path: Path, directory: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    directory.mkdir(mode=0o700)
    for name in ("scheduler.partial", "scheduler.bin.partial"):
        (directory / name).symlink_to(precious)
    CounterWriter.create(directory, SCHEDULER).close()
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_refused(directory: Path, mode: int) -> None:
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(IntegrityError, match=f"has mode {mode:o}"):
        CounterWriter.create(directory, SCHEDULER)
    assert not list(directory.iterdir())


def test_a_link_in_the_place_of_the_folder_is_refused(tmp_path: Path, directory: Path) -> None:
    (tmp_path / "another").mkdir(mode=0o700)
    directory.symlink_to(tmp_path / "another", target_is_directory=True)
    with pytest.raises(IntegrityError, match="is a link or a file"):
        CounterWriter.create(directory, SCHEDULER)
    assert not list((tmp_path / "another").iterdir())


def test_only_this_user_can_read_and_write(directory: Path) -> None:
    with CounterWriter.create(directory, SCHEDULER) as writer:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert stat.S_IMODE(writer.path.stat().st_mode) == 0o600


def test_a_reader_goes_on_when_the_folder_is_gone(directory: Path) -> None:
    """As at a logout, which unmounts XDG_RUNTIME_DIR under a server that goes on."""
    with (
        CounterWriter.create(directory, worker_name(0)) as worker,
        CounterWriter.create(directory, SCHEDULER) as scheduler,
    ):
        reader = CounterReader(directory)
        shutil.rmtree(directory)
        worker.add("evictions_total", 7)
        scheduler.add("refused_admissions_total", 2)
        values = reader.read()
        assert (values["evictions_total"], values["refused_admissions_total"], values["workers"]) == (7, 2, 0)
        assert CounterReader(directory).read() == {}, "who comes later finds nothing"
        worker.close()
        assert reader.read() == {}, "its writer is gone"


def test_a_reader_finds_who_comes_later_and_forgets_who_leaves(directory: Path) -> None:
    reader = CounterReader(directory)
    for evictions in (3, 5):
        with CounterWriter.create(directory, worker_name(0)) as worker:
            worker.add("evictions_total", evictions)
            assert reader.read()["evictions_total"] == evictions
        assert reader.read() == {}
