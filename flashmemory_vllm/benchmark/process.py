"""An engine's process: started with a job, followed through the events that it writes to a file."""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from flashmemory_vllm.benchmark.cells import EngineSetup
from flashmemory_vllm.benchmark.measure import Work
from flashmemory_vllm.files import write_json
from flashmemory_vllm.processes.engine_log import find_error, has_failed
from flashmemory_vllm.processes.guarded import GuardedProcess

WORKER_MODULE = "flashmemory_vllm.cli.bench_worker"
STARTUP_SECONDS = 1800.0
POLL_SECONDS = 0.1
# For an engine that has said that it failed, or that it is done, to end by itself
ENDING_SECONDS = 30.0
# Characters of the log that are looked at again with what comes next: enough for a sentence that was cut
_OVERLAP = 200

EventKind = Literal["up", "begin", "figures", "skipped", "done"]


@dataclass(frozen=True, slots=True)
class Event:
    """What an engine's process tells.

    Attributes:
        kind: the engine is up, a load begins, its figures are there, it was skipped, or all is done.
        place: which load of the job; 0 where it is about none.
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
        deadline: `time.monotonic()` of this machine after which no load begins, or None.
    """

    setup: EngineSetup
    works: Sequence[Work]
    deadline: float | None = None

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        write_json(path, asdict(self), indent=None)

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
        startup_seconds: how long the engine may take until it is up.
    """

    def __init__(self, job: Job, log: Path | None = None, startup_seconds: float = STARTUP_SECONDS) -> None:
        self._job = job
        self._kept_log = log
        self._startup_seconds = startup_seconds
        self._is_done, self._has_failed = False, False
        self._given_up: str | None = None

    def __enter__(self) -> "EngineProcess":
        with ExitStack() as started:
            self._folder = Path(started.enter_context(tempfile.TemporaryDirectory(prefix="flashmemory-bench-")))
            self._job.write(self._folder / "job.json")
            self._events.touch()
            plugins = "" if self._job.setup.ours is None else "flashmemory"
            command = [sys.executable, "-m", WORKER_MODULE, str(self._folder / "job.json"), str(self._events)]
            log = started.enter_context(self._log.open("wb"))
            started.callback(self._keep_log)
            self._process = started.enter_context(GuardedProcess(command, log, {**os.environ, "VLLM_PLUGINS": plugins}))
            self._running = started.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._running.close()

    def follow(self) -> Iterator[Event]:
        """Events of loads as they are told, until all are done, the process has ended, or it will never go on."""
        deadline = time.monotonic() + self._startup_seconds
        given_up = f"the engine was not up after {self._startup_seconds:g} s"
        with self._events.open(encoding="utf-8") as events, self._log.open(encoding="utf-8", errors="replace") as log:
            partial, printed = "", ""
            while True:
                has_ended = self._process.poll() is not None
                partial += events.read()
                *lines, partial = partial.split("\n")
                for event in (Event(**json.loads(line)) for line in lines):
                    if event.kind == "up":
                        deadline = math.inf
                    elif event.kind == "done":
                        self._let_it_end()
                        return
                    else:
                        yield event
                if has_ended:
                    return
                printed = printed[-_OVERLAP:] + log.read()
                if not self._has_failed and has_failed(printed):
                    # It may hang on its way out, and vLLM's other processes wait for it without a limit
                    self._has_failed = True
                    deadline, given_up = time.monotonic() + ENDING_SECONDS, "the engine failed and does not end"
                if time.monotonic() > deadline:
                    self._given_up = given_up
                    return
                time.sleep(POLL_SECONDS)

    def error(self) -> str | None:
        """Why the engine has ended early or was given up, in one line; None if it has done its job."""
        status = self._process.poll()
        if self._is_done or status == 0:
            return None
        told = find_error(self._log.read_text(encoding="utf-8", errors="replace"))
        if self._given_up is None or self._has_failed:
            return told or self._given_up or f"exit code {status}"
        return self._given_up if told is None else f"{self._given_up}; the last error in its log: {told}"

    @property
    def _events(self) -> Path:
        return self._folder / "events.jsonl"

    @property
    def _log(self) -> Path:
        return self._folder / "log"

    def _let_it_end(self) -> None:
        """It has told all that it has to: it may clean up, but if it hangs on its way out, nobody waits for it."""
        self._is_done = True
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDING_SECONDS)

    def _keep_log(self) -> None:
        if self._kept_log is not None:
            with self._kept_log.open("a", encoding="utf-8") as kept:
                kept.write(self._log.read_text(encoding="utf-8", errors="replace"))
