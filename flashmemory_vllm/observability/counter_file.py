"""One file of counters: its layout, who writes it, and how it is read.

offset 0   magic, layout hash, pid, num_slots, num_logical_blocks     (int64 each)
offset 40  one float64 for each value of the metric table, in its order
"""

import errno
import fcntl
import hashlib
import os
import re
import stat
import struct
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from mmap import ACCESS_READ, mmap
from pathlib import Path

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.observability.metrics import SERIES

SUFFIX = ".bin"
SCHEDULER = "scheduler"
WORKER_PREFIX = "worker-"

_FILE_NAME = re.compile(rf"({SCHEDULER}|{WORKER_PREFIX}\d+){re.escape(SUFFIX)}")
# Not there, no permission, a link, a folder that is none, a socket: nothing of ours
_NOT_OURS = frozenset({errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.ENXIO})
_LAYOUT = hashlib.sha256(",".join(f"{key}:{spec.kind}" for key, spec in SERIES.items()).encode()).digest()
# What every file of this version of the package begins with: magic and layout hash
_STAMP = b"FLASHMEM" + _LAYOUT[:8]
NUM_SLOTS_WORD = 3
NUM_LOGICAL_BLOCKS_WORD = 4
HEADER_BYTES = 8 * 5
FILE_BYTES = HEADER_BYTES + 8 * len(SERIES)


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a worker allocated.

    Attributes:
        num_slots: device slots, the reserved one included.
        num_logical_blocks: blocks that the host pool holds.
    """

    num_slots: int
    num_logical_blocks: int


@dataclass(frozen=True, slots=True)
class CounterFile:
    """Content of one file.

    Attributes:
        name: the writer's.
        capacity: zeros until a worker has published it.
        values: one for each of `SERIES`, in its order.
    """

    name: str
    capacity: Capacity
    values: Sequence[float]


class OpenCounterFile:
    """A file of a writer's name, open for reading; it can be read for good, also when its name is gone.

    Make it with `open`.

    Attributes:
        path: where it was found.
    """

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path = path
        self._file = file
        weakref.finalize(self, file.close)

    @classmethod
    def open(cls, path: Path) -> "OpenCounterFile | None":
        """Open a file. None if it is not there, is a link, or is no regular file of this user."""
        try:
            file = FileIO(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as error:
            if error.errno not in _NOT_OURS:
                raise
            return None
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            file.close()
            return None
        return cls(path, file)

    @property
    def name(self) -> str:
        """The writer's."""
        return self.path.stem

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: what tells it from a later file of the same name."""
        return identity_of(os.fstat(self._file.fileno()))

    @property
    def is_written(self) -> bool:
        """Whether a living process holds its lock."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._file, fcntl.LOCK_UN)
        return False

    @property
    def is_ours(self) -> bool:
        """Whether its size and its first words are those of this version of the package."""
        descriptor = self._file.fileno()
        return os.fstat(descriptor).st_size == FILE_BYTES and os.pread(descriptor, len(_STAMP), 0) == _STAMP

    def read(self) -> CounterFile:
        """Read through a mapping, which loads each aligned number whole; a plain read gives no such promise.

        Raises:
            IntegrityError: it was written by another version of this package.
        """
        if not self.is_ours:
            raise IntegrityError(f"{self.path} has another layout: allowed is that of this version of flashmemory-vllm")
        with mmap(self._file.fileno(), FILE_BYTES, access=ACCESS_READ) as content, memoryview(content) as view:
            header: list[int] = view[:HEADER_BYTES].cast("q").tolist()
            values: Sequence[float] = view[HEADER_BYTES:].cast("d").tolist()
        return CounterFile(self.name, Capacity(header[NUM_SLOTS_WORD], header[NUM_LOGICAL_BLOCKS_WORD]), values)


def new_content() -> bytes:
    """A file of this process, all values zero."""
    return (_STAMP + struct.pack("=q", os.getpid())).ljust(FILE_BYTES, b"\0")


def identity_of(found: os.stat_result) -> tuple[int, int]:
    """Device and inode of a file."""
    return found.st_dev, found.st_ino


def open_files(directory: Path) -> Iterator[OpenCounterFile]:
    """Each file of a writer's name, of living writers and of dead ones."""
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        file = OpenCounterFile.open(path) if _FILE_NAME.fullmatch(path.name) else None
        if file is not None:
            yield file


def living_files(directory: Path) -> Iterator[OpenCounterFile]:
    """Each file that a living process writes."""
    return (file for file in open_files(directory) if file.is_written)
