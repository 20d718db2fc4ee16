"""An engine's process: started with a job, followed through the events that it writes to a file."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from flashmemory_vllm.benchmark.cells import EngineSetup
from flashmemory_vllm.benchmark.measure import Work

WORKER_MODULE = "flashmemory_vllm.cli.bench_worker"
POLL_SECONDS = 0.1
STOP_SECONDS = 30
# The last words of vLLM's processes, which only say that something was said before, and what it goes on after
_NO_CAUSES = ("Engine core initialization failed", "EngineCore encountered an issue", "EngineDeadError", " WARNING ")
_ERROR = re.compile(r"(?:^|[\s\])])((?:\w+\.)*\w+(?:Error|Exception|Interrupt): .+)$")

EventKind = Literal["begin", "figures", "skipped"]


@dataclass(frozen=True, slots=True)
class Event:
    """What an engine's process tells.

    Attributes:
        kind: a load begins, its figures are there, or it was skipped.
        place: which load of the job.
        figures: fields of a row, or `error` with the reason for skipping.
    """

    kind: EventKind
    place: int
    figures: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """What an engine's process gets.

    Attributes:
        setup: how to start the engine.
        works: loads, one after the other.
        deadline: time.time() after which no load begins, or None.
    """

    setup: EngineSetup
    works: Sequence[Work]
    deadline: float | None = None

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Job":
        """Read what `write` wrote."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        works = [Work(**work | {"prompt_lens": tuple(work["prompt_lens"])}) for work in fields["works"]]
        return cls(EngineSetup(**fields["setup"]), works, fields["deadline"])


def tell(path: Path, event: Event) -> None:
    """Append an event, for `follow` in the other process."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(event)) + "\n")


class EngineProcess:
    """Runs a job for as long as a `with` block lasts; nothing of it is left afterwards.

    A process for each configuration, because backends, overrides and CUDA graphs are process-wide state, and the
    device's memory is only free again when a process has ended. What vLLM prints goes to a log.

    Args:
        job: what to do.
        log: file that the log is appended to. Default: none is kept.
    """

    def __init__(self, job: Job, log: Path | None = None) -> None:
        self._job = job
        self._kept_log = log
        self._folder = tempfile.TemporaryDirectory(prefix="flashmemory-bench-")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "EngineProcess":
        self._job.write(self._path("job.json"))
        self._path("events.jsonl").touch()
        plugins = "" if self._job.setup.ours is None else "flashmemory"
        command = [sys.executable, "-m", WORKER_MODULE, str(self._path("job.json")), str(self._path("events.jsonl"))]
        with self._path("log").open("wb") as log:
            # A session of its own, so that the engine's core and workers can be stopped with it
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "VLLM_PLUGINS": plugins},
            )
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()
        if self._kept_log is not None:
            with self._kept_log.open("a", encoding="utf-8") as kept:
                kept.write(self._path("log").read_text(encoding="utf-8", errors="replace"))
        self._folder.cleanup()

    def follow(self) -> Iterator[Event]:
        """Events as they are told, until the process has ended."""
        assert self._process is not None
        with self._path("events.jsonl").open(encoding="utf-8") as file:
            partial = ""
            while True:
                has_ended = self._process.poll() is not None
                partial += file.read()
                *lines, partial = partial.split("\n")
                yield from (Event(**json.loads(line)) for line in lines)
                if has_ended:
                    return
                time.sleep(POLL_SECONDS)

    def error(self) -> str | None:
        """Why the process has ended early, in one line; None if it has done its job."""
        assert self._process is not None
        status = self._process.wait()
        if status == 0:
            return None
        return find_error(self._path("log").read_text(encoding="utf-8", errors="replace")) or f"exit code {status}"

    def _path(self, name: str) -> Path:
        return Path(self._folder.name) / name

    def _stop(self) -> None:
        """End the process and its children, and wait until they have given the device's memory back."""
        if self._process is None:
            return
        # The process leads its group, and its children may outlive it
        group = self._process.pid
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(group, sign)
            deadline = time.monotonic() + STOP_SECONDS
            while (self._process.poll() is None or _has_members(group)) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        self._process.wait()
        self._process = None


def _has_members(group: int) -> bool:
    """Whether a process of the group lives; one that has ended but was not waited for holds no memory."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            # After the name, which may have spaces in it: state, parent, group
            state, _, of_group = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:3]
            if int(of_group) == group and state != "Z":
                return True
    return False


def find_error(log: str) -> str | None:
    """The error that a log of vLLM ends with, without the echoes of it in other processes.

    Args:
        log: what the processes printed.

    Returns:
        The error's type and the first line of its message, or None without an error.
    """
    told = None
    lines = log.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        match = _ERROR.search(line)
        if match and not any(word in line for word in _NO_CAUSES):
            told = match.group(1)
            if "validation error" in told:  # pydantic says on the next line what is wrong
                told = f"{told}: {following.split(' [type=')[0].strip()}"
    return told
