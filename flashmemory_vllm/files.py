"""Files that are there whole or not at all, whatever the disk does and whenever a process ends."""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from flashmemory_vllm.errors import StorageError

# Where room is of no help: not there, not a folder or not a file, or not to be written to
_CLOSED = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS})


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write to the path given inside the block; it takes the place of `path` once all is written.

    Args:
        path: the file. What was there before stays if anything goes wrong, and nothing else is left.

    Raises:
        StorageError: the disk is full, or takes the file for no other reason.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        # In a folder that others may write to, a link of this name may lie there: it is not followed
        partial.unlink(missing_ok=True)
        partial.touch(exist_ok=False)
        yield partial
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise _cannot_be_written(path, error) from error
    finally:
        with suppress(OSError):  # it is not there, or its place takes and gives nothing
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        StorageError: as `whole_file`.
    """
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def append_text(path: Path, text: str) -> None:
    """Append to a text file, all of it or nothing; the file is made if it is not there.

    Raises:
        StorageError: as `whole_file`; what was there before stays.
    """
    try:
        with path.open("ab", buffering=0) as file:
            before, left = file.tell(), memoryview(text.encode())
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(before)
                raise
    except OSError as error:
        raise _cannot_be_written(path, error) from error


def write_json(path: Path, content: object, indent: int | None = 1) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        StorageError: as `whole_file`.
    """
    write_text(path, json.dumps(content, indent=indent) + "\n")


def _cannot_be_written(path: Path, error: Exception) -> StorageError:
    lacks_room = getattr(error, "errno", None) not in _CLOSED
    remedy = "Make room, then run the same command again" if lacks_room else "Name another place, or open this one"
    return StorageError(f"{path}: cannot be written ({error}); files written before it are whole. {remedy}")
