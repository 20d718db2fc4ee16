"""A process that is started for a `with` block and is gone after it, with all that came out of it."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from flashmemory_vllm.processes import guard

STOP_SECONDS = 30.0
_NO_LIFELINE = -1
_running: "set[GuardedProcess]" = set()


class GuardedProcess:
    """Runs a command for as long as a `with` block lasts, or until this process ends, in whatever way.

    Between the two stands a small process, `guard`, which sees the end of this one even if that is a SIGKILL. The
    command runs in a session of its own: a Ctrl-C at the terminal reaches this process, which then ends the command.

    Args:
        command: program and arguments.
        output: file for what all its processes print. Default: where this process prints.
        environment: environment variables. Default: those of this process.
        stop_seconds: how long its processes may take to end by themselves, once they have been asked to.
    """

    def __init__(
        self,
        command: Sequence[str],
        output: IO[str] | IO[bytes] | None = None,
        environment: Mapping[str, str] | None = None,
        stop_seconds: float = STOP_SECONDS,
    ) -> None:
        # Not isolated ("-I"): what it imports may lie where only this user's Python looks, or in PYTHONPATH
        self._command = [sys.executable, "-P", str(Path(guard.__file__)), str(stop_seconds), *command]
        self._output = output
        self._environment = None if environment is None else dict(environment)
        self._guard: subprocess.Popen[bytes] | None = None
        self._lifeline = _NO_LIFELINE

    def __enter__(self) -> Self:
        watched, self._lifeline = os.pipe()
        try:
            self._guard = subprocess.Popen(
                self._command,
                stdin=watched,
                stdout=self._output,
                stderr=None if self._output is None else subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        finally:
            os.close(watched)
        _running.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def poll(self) -> int | None:
        """The command's exit code as a shell tells it, or None while any of its processes runs."""
        return self._started().poll()

    def wait(self, seconds: float | None = None) -> int:
        """Wait for the end of all its processes.

        Args:
            seconds: how long. Default: for ever.

        Returns:
            The command's exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        return self._started().wait(seconds)

    def stop(self) -> None:
        """End it, and wait until its processes have given back what they held."""
        self.ask_to_stop()
        if self._guard is not None:
            self._guard.wait()
        _running.discard(self)

    def ask_to_stop(self) -> None:
        """Begin its end and wait for nothing; may be called by a signal handler."""
        lifeline, self._lifeline = self._lifeline, _NO_LIFELINE
        if lifeline != _NO_LIFELINE:
            os.close(lifeline)

    def _started(self) -> "subprocess.Popen[bytes]":
        assert self._guard is not None, "the block was not entered"
        return self._guard


def running() -> frozenset[GuardedProcess]:
    """Every guarded process whose block this process is in."""
    return frozenset(_running)
