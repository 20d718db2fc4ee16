"""Ends this process when the one that it works for has ended."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence

import psutil

POLL_SECONDS = 1.0
GRACE_SECONDS = 10.0


def end_with(ancestors: Sequence[int], tell: Callable[[str], None], grace_seconds: float = GRACE_SECONDS) -> None:
    """Watch this process's parent, and that one's, and end this process when one of them has ended.

    First with SIGTERM, which lets it clean up, then with SIGKILL: a process that hangs in a call hears nothing else.
    The parent's number is looked at, once a second. A pipe to it would have its other end in every process that the
    parent forks later, and the kernel's own signal (PR_SET_PDEATHSIG) comes when the *thread* ends that started this
    process.

    Args:
        ancestors: process ids: the parent's, its parent's, and so on as far as they matter.
        tell: takes the reason, before the end.
        grace_seconds: between the two signals.
    """
    threading.Thread(
        target=_watch, args=(tuple(ancestors), tell, grace_seconds), name="flashmemory-parents", daemon=True
    ).start()


def _watch(ancestors: tuple[int, ...], tell: Callable[[str], None], grace_seconds: float) -> None:
    while (ended := _first_ended(ancestors)) is None:
        time.sleep(POLL_SECONDS)
    tell(f"process {ended}, which this one works for, has ended: ending")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def _first_ended(ancestors: tuple[int, ...]) -> int | None:
    """The nearest ancestor that has ended: its children have another parent then."""
    child = os.getpid()
    for ancestor in ancestors:
        try:
            parent = psutil.Process(child).ppid()
        except psutil.NoSuchProcess:
            return child
        if parent != ancestor:
            return ancestor
        child = ancestor
    return None
