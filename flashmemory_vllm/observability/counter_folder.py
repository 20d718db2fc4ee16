"""The folder of an engine's counter files: where it is, whom it must belong to, and what may be removed.

Nothing is removed but files that are provably ours and whose writers are dead, and a folder that is empty then.
No link is followed.
"""

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.observability.counter_file import open_files

_PREFIX = "flashmemory-"


def engine_directory(engine_id: str, engine_index: int = 0) -> Path:
    """Directory of one engine's files, the same in each of its processes.

    Args:
        engine_id: what tells the engines of this machine apart.
        engine_index: data-parallel index of the engine.

    Returns:
        A path in memory-backed storage where there is some. Nothing is created.
    """
    shared_memory = Path("/dev/shm")  # noqa: S108 - the directory below it is private to its user
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR")
    fallback = shared_memory if shared_memory.is_dir() else Path(tempfile.gettempdir())
    root = Path(runtime_dir) if runtime_dir and Path(runtime_dir).is_dir() else fallback
    return root / f"{_PREFIX}{engine_id}-{engine_index}"


def make_private(directory: Path) -> None:
    """Create a folder that only this user can enter, or take one that is there if nobody else can write to it.

    Raises:
        IntegrityError: there is something else in its place, or another user made it or may write to it.
    """
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700, parents=True)
    found = directory.lstat()
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISDIR(found.st_mode):
        raise IntegrityError(f"{directory} is a link or a file: allowed is a folder of this user")
    if found.st_uid != os.geteuid():
        raise IntegrityError(f"{directory} was made by another user ({found.st_uid}): allowed is a folder of this user")
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise IntegrityError(f"{directory} has mode {mode:o}: allowed is one that no other user may write to")


def remove_dead(root: Path) -> None:
    """Remove the files of this user's dead writers below `root`, and each folder that is empty then."""
    for directory in root.glob(f"{_PREFIX}*"):
        if _is_own_folder(directory) and _remove_dead_files(directory):
            remove_if_empty(directory)


def remove_if_empty(directory: Path) -> None:
    """Remove a folder that holds nothing."""
    # Otherwise it has other content, has gone, or is in a place that nothing can be removed from: it stays.
    with suppress(OSError):
        directory.rmdir()


def _is_own_folder(directory: Path) -> bool:
    try:
        found = directory.lstat()
    except FileNotFoundError:  # its owner removed it just now
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _remove_dead_files(directory: Path) -> int:
    """Remove them and say how many there were."""
    dead = [file for file in open_files(directory) if file.is_ours and not file.is_written]
    for file in dead:
        file.path.unlink(missing_ok=True)
    return len(dead)
