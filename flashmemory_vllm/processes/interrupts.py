"""One way for a command to be ended from outside: SIGTERM and SIGHUP unwind it as Ctrl-C does."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from flashmemory_vllm.processes.guarded import running

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal asks this process to end.

    Args:
        sign: the signal's number.
    """

    def __init__(self, sign: int) -> None:
        super().__init__(signal.Signals(sign).name)
        self.sign = sign

    @property
    def exit_code(self) -> int:
        """As a shell tells it."""
        return 128 + self.sign


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, these signals raise `Interrupted` and begin the end of every guarded process started inside.

    A signal that this process was started to ignore, as `nohup` has it, stays ignored. Outside of the main thread,
    which alone gets signals, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    others = running()

    def interrupt(sign: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001 - a signal handler's signature
        for process in running() - others:
            process.ask_to_stop()
        raise Interrupted(sign)

    heeded = [sign for sign in SIGNALS if signal.getsignal(sign) is not signal.SIG_IGN]
    before = {sign: signal.signal(sign, interrupt) for sign in heeded}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
