"""Runs a module as a program, in a process that has vLLM imported already.

An import of vLLM is ten seconds of a core, most of what many a test takes. Each environment gets one process that
does nothing else; a program is a fork of it, so it is as fresh as any. On a GPU, where several run at once, each is a
process of its own.
"""

import atexit
import functools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 1800.0
# Another one for each test
OF_A_TEST = ("PYTEST_CURRENT_TEST",)


def run_module(
    module: str,
    env: Mapping[str, str],
    arguments: Sequence[str] = (),
    stdin: str = "",
    timeout_s: float = TIMEOUT_SECONDS,
) -> str:
    """Run a module as `python -m` does, in the root of the repository.

    Args:
        module: its name.
        env: all environment variables.
        arguments: of the command line.
        stdin: what it can read.
        timeout_s: how long it may take.

    Returns:
        What it printed on standard output.

    Raises:
        AssertionError: it failed; the message ends with its output.
        TimeoutError, subprocess.TimeoutExpired: it was not done in time, and has been killed.
    """
    with tempfile.TemporaryDirectory(prefix="flashmemory-test-") as folder:
        files = {name: str(Path(folder, name)) for name in ("stdin", "stdout", "stderr")}
        for name, path in files.items():
            Path(path).write_text(stdin if name == "stdin" else "")
        run = _run_alone if torch.version.cuda else _run_warm
        kept = {name: value for name, value in env.items() if name not in OF_A_TEST}
        code = run({"module": module, "arguments": list(arguments), **files}, kept, timeout_s)
        out, err = (Path(files[name]).read_text(errors="replace") for name in ("stdout", "stderr"))
    assert code == 0, f"{module} failed ({code}):\n{out[-4000:]}\n{err[-6000:]}"
    return out


def _run_alone(request: Mapping[str, Any], env: Mapping[str, str], timeout_s: float) -> int:
    command = [sys.executable, "-m", request["module"], *request["arguments"]]
    with (
        Path(request["stdin"]).open() as stdin,
        Path(request["stdout"]).open("w") as stdout,
        Path(request["stderr"]).open("w") as stderr,
    ):
        files: dict[str, Any] = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
        return subprocess.run(command, timeout=timeout_s, check=False, cwd=ROOT, env=dict(env), **files).returncode


def _run_warm(request: Mapping[str, Any], env: Mapping[str, str], timeout_s: float) -> int:
    return _warm(tuple(sorted(env.items()))).run(json.dumps(request), timeout_s)


class _WarmProcess:
    """One process that forks; it ends with this one, and so does what it has forked."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.warm_main"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(env),
            cwd=ROOT,
            start_new_session=True,
        )
        self._unread = b""
        atexit.register(self.kill)
        ready = self._read_line(TIMEOUT_SECONDS)
        assert ready == "ready", f"vLLM could not be imported: {ready!r}"

    @property
    def is_running(self) -> bool:
        """It has neither ended nor been killed."""
        return self._process.poll() is None

    def run(self, request: str, timeout_s: float) -> int:
        """Exit code of what a request asks for."""
        assert self._process.stdin is not None
        self._process.stdin.write(request.encode() + b"\n")
        self._process.stdin.flush()
        return int(self._read_line(timeout_s))

    def kill(self) -> None:
        """End it with all that it has forked, whatever they do."""
        if self.is_running:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _read_line(self, timeout_s: float) -> str:
        assert self._process.stdout is not None
        end = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, end - time.monotonic())):
                    self.kill()
                    raise TimeoutError(f"not done after {timeout_s:.0f} s")
                got = os.read(self._process.stdout.fileno(), 4096)
                assert got, f"the process that forks has ended with {self._process.wait()}"
                self._unread += got
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()


@functools.cache
def _warm_processes() -> dict[tuple[tuple[str, str], ...], _WarmProcess]:
    return {}


def _warm(env: tuple[tuple[str, str], ...]) -> _WarmProcess:
    """The process for an environment; a new one where the last one was killed."""
    processes = _warm_processes()
    if env not in processes or not processes[env].is_running:
        processes[env] = _WarmProcess(dict(env))
    return processes[env]
