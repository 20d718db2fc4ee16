"""One file of counters: its layout, who writes it, and how it is read.

offset 0   magic, layout hash, pid, num_slots, num_logical_blocks     (int64 each)
offset 40  one float64 for each value of the metric table, in its order
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from mmap import ACCESS_READ, mmap
from pathlib import Path

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.observability.metrics import SERIES

SUFFIX = ".bin"

_LAYOUT = hashlib.sha256(",".join(f"{key}:{spec.kind}" for key, spec in SERIES.items()).encode()).digest()
# What every file of this version of the package begins with: magic and layout hash
HEADER_STAMP = (int.from_bytes(b"FLASHMEM", "little"), int.from_bytes(_LAYOUT[:8], "little", signed=True))
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


def living_files(directory: Path) -> Iterator[CounterFile]:
    """Content of each file that a living process writes."""
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            with FileIO(path) as file:
                if _is_locked(file):
                    yield _read(path, file)
        except FileNotFoundError:  # its writer closed it just now
            continue


def _read(path: Path, file: FileIO) -> CounterFile:
    """Read through a mapping, which loads each aligned number whole; a plain read gives no such promise."""
    if os.fstat(file.fileno()).st_size != FILE_BYTES:
        raise _unknown_layout(path)
    with mmap(file.fileno(), FILE_BYTES, access=ACCESS_READ) as content, memoryview(content) as view:
        header: list[int] = view[:HEADER_BYTES].cast("q").tolist()
        values: Sequence[float] = view[HEADER_BYTES:].cast("d").tolist()
    if tuple(header[:2]) != HEADER_STAMP:
        raise _unknown_layout(path)
    return CounterFile(path.stem, Capacity(header[NUM_SLOTS_WORD], header[NUM_LOGICAL_BLOCKS_WORD]), values)


def _unknown_layout(path: Path) -> IntegrityError:
    return IntegrityError(f"{path} has another layout: allowed is that of this version of flashmemory-vllm")


def _is_locked(file: FileIO) -> bool:
    """Whether a living process holds the lock of an open file."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def is_written(path: Path) -> bool:
    """Whether a living process writes a file."""
    with FileIO(path) as file:
        return _is_locked(file)
