"""What a signal ends: this process's work, and what it started for it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashmemory_vllm.processes.guarded import GuardedProcess
from flashmemory_vllm.processes.interrupts import SIGNALS, Interrupted, interruptible
from tests.unit.processes.test_guarded import PATIENCE_SECONDS, assert_gone, command, started


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[GuardedProcess]:
    """Started by somebody else in this process, before."""
    (tmp_path / "elsewhere").mkdir()
    with GuardedProcess(command(tmp_path / "elsewhere"), stop_seconds=0.5) as process:
        started(tmp_path / "elsewhere")
        yield process


def _hit_inside(sign: signal.Signals, folder: Path) -> None:
    with interruptible(), GuardedProcess(command(folder), stop_seconds=0.5) as inside:
        started(folder)
        try:
            os.kill(os.getpid(), sign)
        finally:
            # Before the block that owns it ends
            assert inside.wait(PATIENCE_SECONDS) == 128 + signal.SIGTERM


@pytest.mark.parametrize("sign", SIGNALS)
def test_a_signal_ends_what_was_started_inside_and_nothing_else(
    sign: signal.Signals, elsewhere: GuardedProcess, tmp_path: Path
) -> None:
    before = signal.getsignal(sign)
    with pytest.raises(Interrupted) as interrupted:
        _hit_inside(sign, tmp_path)
    assert_gone([int(pid) for pid in (tmp_path / "pids").read_text().split()])
    assert interrupted.value.exit_code == 128 + sign
    assert elsewhere.poll() is None
    assert signal.getsignal(sign) is before


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
