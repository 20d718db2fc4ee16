"""Counters that cross processes: one small memory-mapped file for each writer, read by whoever asks.

vLLM has no channel from its workers to the API server for numbers of our own, so every worker and the
scheduler own one file in a directory that belongs to the engine. A file has one writer; each value is one
aligned 8-byte store, so a reader never sees half a number, and neither side ever waits for the other.

A writer holds a lock on its file for as long as it lives. A file that nobody holds was left by a dead
process: it is not read, and the next writer of the machine removes it. A lock says that across containers,
where a process id does not.

The directory may vanish under a server that goes on (a logout removes what lies in XDG_RUNTIME_DIR and, by
default, in /dev/shm). Writers and readers keep their files open, so both go on with them.
"""

import atexit
import fcntl
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from io import FileIO
from mmap import mmap
from pathlib import Path
from types import TracebackType

from flashmemory_vllm.errors import ConfigError, IntegrityError
from flashmemory_vllm.observability.counter_file import (
    FILE_BYTES,
    HEADER_BYTES,
    NUM_LOGICAL_BLOCKS_WORD,
    NUM_SLOTS_WORD,
    SCHEDULER,
    SUFFIX,
    WORKER_PREFIX,
    Capacity,
    OpenCounterFile,
    identity_of,
    living_files,
    new_content,
)
from flashmemory_vllm.observability.counter_folder import engine_directory, make_private, remove_dead, remove_if_empty
from flashmemory_vllm.observability.metrics import METRICS, RATIOS, SERIES

__all__ = [
    "SCHEDULER",
    "Capacity",
    "CounterReader",
    "CounterWriter",
    "engine_directory",
    "read_capacity",
    "worker_name",
]


def worker_name(rank: int) -> str:
    """Writer name of the worker of one rank."""
    return f"{WORKER_PREFIX}{rank}"


class CounterWriter:
    """The one writer of one file. Not safe for use by several threads.

    Make it with `create`. It closes itself when the process exits in good order; `close` does so earlier.
    """

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path = path
        self._file = file
        self._map = mmap(file.fileno(), FILE_BYTES)
        self._header = memoryview(self._map)[:HEADER_BYTES].cast("q")
        self._values = memoryview(self._map)[HEADER_BYTES:].cast("d")
        source = "scheduler" if path.stem == SCHEDULER else "worker"
        self._index = {key: index for index, (key, spec) in enumerate(SERIES.items()) if spec.source == source}
        self._first_bucket = {
            spec.name: self._index[next(iter(spec.series))] for spec in METRICS if spec.bounds and spec.source == source
        }

    @classmethod
    def create(cls, directory: Path, name: str) -> "CounterWriter":
        """Create the file of one writer, all values zero, and remove what dead processes left here.

        Args:
            directory: the engine's, created if it is not there.
            name: `SCHEDULER` or a `worker_name`.

        Raises:
            ConfigError: the name is neither.
            IntegrityError: another living process writes this file, something else has its name, or the directory
                is not this user's alone.
        """
        if name != SCHEDULER and not name.removeprefix(WORKER_PREFIX).isdecimal():
            raise ConfigError(f"writer name is {name!r}: allowed is {SCHEDULER!r} or {worker_name(0)!r} and so on")
        remove_dead(directory.parent)
        make_private(directory)
        path = directory / f"{name}{SUFFIX}"
        writer = cls(path, _create(path))
        atexit.register(writer.close)
        return writer

    def publish_capacity(self, capacity: Capacity) -> None:
        """Tell the scheduler's process what this worker allocated."""
        self._header[NUM_LOGICAL_BLOCKS_WORD] = capacity.num_logical_blocks
        # Last: a number of slots above zero says that both numbers are there
        self._header[NUM_SLOTS_WORD] = capacity.num_slots

    def add(self, name: str, amount: float = 1) -> None:
        """Increase a counter.

        Args:
            name: a metric of this writer's source, without the prefix.
            amount: what to add, not negative.

        Raises:
            KeyError: the metric is unknown or belongs to another source.
        """
        self._values[self._index[name]] += amount

    def set(self, name: str, value: float) -> None:
        """Set a gauge.

        Args:
            name: a metric of this writer's source, without the prefix.
            value: its value now.

        Raises:
            KeyError: the metric is unknown or belongs to another source.
        """
        self._values[self._index[name]] = value

    def observe(self, name: str, counts: Sequence[int], total: float) -> None:
        """Add values to a histogram.

        Args:
            name: a metric of this writer's source, without the prefix.
            counts: how many values fell into each of its buckets, `[len(bounds) + 1]`.
            total: sum of the values.

        Raises:
            KeyError: the metric is unknown, no histogram, or belongs to another source.
        """
        first, values = self._first_bucket[name], self._values
        seen = sum(counts)
        values[first + len(counts) + 1] += total
        values[first + len(counts)] += seen
        # The largest bucket first, so that a reader never sees one with more than a larger one
        for index in range(len(counts) - 1, -1, -1):
            values[first + index] += seen
            seen -= counts[index]

    def close(self) -> None:
        """Remove the file, and the engine's directory after its last file. Closing twice is allowed."""
        if self._file.closed:
            return
        with suppress(FileNotFoundError):  # the directory has gone
            if identity_of(self.path.lstat()) == identity_of(os.fstat(self._file.fileno())):
                self.path.unlink()
        self._header.release()
        self._values.release()
        self._map.close()
        self._file.close()
        atexit.unregister(self.close)
        remove_if_empty(self.path.parent)

    def __enter__(self) -> "CounterWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class CounterReader:
    """Sums what the living writers of one engine have counted. Writes nothing.

    Files that it has found stay open, from its making on, and are read also when the directory has gone.

    Args:
        directory: the engine's.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[tuple[int, int], OpenCounterFile] = {}
        self._look()

    def read(self) -> dict[str, float]:
        """Read every metric.

        Returns:
            Value by name of a series without the prefix: the sum over the writers, and each derived metric from those
            sums. Empty while no worker writes, so that a dying engine is not read as one with empty counters.

        Raises:
            IntegrityError: a file was written by another version of this package.
        """
        self._look()
        files = [file.read() for file in self._files.values()]
        if all(file.name == SCHEDULER for file in files):
            return {}
        totals = [sum(column) for column in zip(*(file.values for file in files), strict=True)]
        values = dict(zip(SERIES, totals, strict=True))
        for name, (part, whole) in RATIOS.items():
            values[name] = values[part] / values[whole] if values[whole] else 0.0
        return values

    def _look(self) -> None:
        """Open the files that are new, close those of writers that are gone."""
        found = {file.identity: file for file in living_files(self._directory)}
        known = {identity: file for identity, file in self._files.items() if file.is_written}
        self._files = found | known


def read_capacity(directory: Path) -> Capacity:
    """What every worker of an engine can serve: the smallest of each number over the workers.

    Args:
        directory: the engine's.

    Raises:
        IntegrityError: no worker has published its capacity.
    """
    workers = [file.read().capacity for file in living_files(directory) if file.name != SCHEDULER]
    num_published = sum(capacity.num_slots > 0 for capacity in workers)
    if not workers or num_published < len(workers):
        raise IntegrityError(f"{num_published} of {len(workers)} workers in {directory} published their capacity")
    return Capacity(
        num_slots=min(capacity.num_slots for capacity in workers),
        num_logical_blocks=min(capacity.num_logical_blocks for capacity in workers),
    )


def _create(path: Path) -> FileIO:
    """Create a file of zeros behind its stamp, and lock it for as long as it is open."""
    # Filled and locked under a name that nobody knows, so that no reader meets a half-made or unlocked file
    descriptor, partial = tempfile.mkstemp(prefix=f"{path.stem}-", suffix=".partial", dir=path.parent)
    file = FileIO(descriptor, "r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write(new_content())
        os.link(partial, path)  # unlike a rename it replaces nothing
    except OSError as error:
        file.close()
        if isinstance(error, FileExistsError):
            raise _name_is_taken(path) from None
        raise
    finally:
        Path(partial).unlink()
    return file


def _name_is_taken(path: Path) -> IntegrityError:
    found = OpenCounterFile.open(path)
    if found is not None and found.is_written:
        return IntegrityError(f"{path} is written by another living process: allowed is one writer for each file")
    return IntegrityError(f"{path} exists and is no counter file of this version: allowed is none of this name")
