"""Runs a command until it ends or its owner does, and leaves nothing of it behind.

`python -P guard.py SECONDS COMMAND...`, its standard input a pipe that the owner holds the other end of. When that is
closed, because the owner wants an end or has come to its own, by SIGKILL too, every process that came out of the
command gets SIGTERM, and SIGKILL after so many seconds. The same happens to what a command that has ended by itself has
left.
The exit code is the command's, with 128 added to a signal as in a shell.

A process of its own and not a thread, because nothing else outlives a SIGKILL of the owner. It stands by itself and
imports nothing of ours: it starts in a few hundredths of a second.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import psutil

# Of Linux's <sys/prctl.h>
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36
POLL_SECONDS = 0.05
# A process that was killed still has to give its memory back; pinned memory takes about 0.6 s a GiB
KILL_SECONDS = 300


def main(stop_seconds: float, command: list[str]) -> int:
    """Run the command; its exit code."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    # From here on each signal that has a handler is a byte to read
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for sign in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(sign, _heed)
    _prctl(_SET_CHILD_SUBREAPER, 1)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_die_with_guard,  # noqa: PLW1509 - there is one thread
    )
    lifeline = sys.stdin.fileno()
    while process.returncode is None:
        ready, _, _ = select.select([lifeline, woken], [], [])
        if lifeline in ready or set(os.read(woken, 512)) - {signal.SIGCHLD}:
            break
        _reap(process)
    _end_all(process, stop_seconds)
    code = process.returncode
    if code is None:  # it does not even end when it is killed
        return 128 + signal.SIGKILL
    return code if code >= 0 else 128 - code


def _heed(sign: int, frame: FrameType | None) -> None:
    """Nothing: `main` reads the signal."""


def _die_with_guard() -> None:
    """In the command's process: whoever kills this guard kills the command."""
    _prctl(_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _reap(process: "subprocess.Popen[bytes]") -> None:
    """Collect everything that has ended: orphans of the command's are children of this process now."""
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            if pid == process.pid:
                process.returncode = os.waitstatus_to_exitcode(status)


def _end_all(process: "subprocess.Popen[bytes]", stop_seconds: float) -> None:
    """SIGTERM to all, SIGKILL to what is left, which may go on starting others meanwhile."""
    for child in _descendants():
        with suppress(psutil.NoSuchProcess):
            child.terminate()
    _until(lambda: _all_ended(process), stop_seconds)
    _until(lambda: _all_ended(process, kill=True), KILL_SECONDS)


def _until(done: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(POLL_SECONDS)


def _all_ended(process: "subprocess.Popen[bytes]", *, kill: bool = False) -> bool:
    _reap(process)
    left = _descendants()
    if kill:
        for child in left:
            with suppress(psutil.NoSuchProcess):
                child.kill()
    return not left


def _descendants() -> list[psutil.Process]:
    """Those that live, in whatever group or session; a zombie holds nothing and waits for its own parent."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
