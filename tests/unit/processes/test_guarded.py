"""What a guarded process started is gone when its owner wants that, and when its owner is, however it ended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flashmemory_vllm.processes.guarded import GuardedProcess

PATIENCE_SECONDS = 1200
# Waits for ever, beside one that ignores SIGTERM in a session of its own, as an engine's core may that hangs
COMMAND = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(6000)"
child = subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
(folder / "pids").write_text(f"{os.getpid()} {child.pid} {os.getppid()}")
(folder / "up").touch()
time.sleep(float(sys.argv[2]))
"""
OWNER = """
import sys, time
from flashmemory_vllm.processes.guarded import GuardedProcess
with GuardedProcess(sys.argv[1:], stop_seconds=0.5):
    time.sleep(6000)
"""


def command(folder: Path, seconds: float = 6000) -> list[str]:
    return [sys.executable, "-c", COMMAND, str(folder), str(seconds)]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Bounded polling; the bound only keeps a failing test from hanging."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {PATIENCE_SECONDS} s"
        time.sleep(0.05)


def started(folder: Path) -> list[int]:
    """Ids of the command's two processes and of the guard, once they are there."""
    wait_until((folder / "up").exists, "the command has started")
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def assert_gone(pids: list[int]) -> None:
    wait_until(lambda: not any(map(is_running, pids)), f"{pids} have ended")


def test_leaving_the_block_ends_all_of_it(tmp_path: Path) -> None:
    with GuardedProcess(command(tmp_path), stop_seconds=0.5) as running:
        pids = started(tmp_path)
        assert running.poll() is None
    assert not any(map(is_running, pids))


def test_the_exit_code_is_the_commands_and_what_it_left_is_ended(tmp_path: Path) -> None:
    with GuardedProcess(command(tmp_path, seconds=0), stop_seconds=0.5) as running:
        pids = started(tmp_path)
        assert running.wait(PATIENCE_SECONDS) == 0
        assert not any(map(is_running, pids))


@pytest.mark.parametrize(
    ("code", "expected"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 128 + 9)]
)
def test_how_a_command_ended_is_told_as_a_shell_does(code: str, expected: int) -> None:
    with GuardedProcess([sys.executable, "-c", code]) as running:
        assert running.wait(PATIENCE_SECONDS) == expected


def test_output_and_environment_are_the_commands(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['GIVEN']); sys.stderr.write('beside')"
    with (
        (tmp_path / "log").open("w") as log,
        GuardedProcess([sys.executable, "-c", code], log, {"GIVEN": "seen"}) as running,
    ):
        running.wait(PATIENCE_SECONDS)
    assert set((tmp_path / "log").read_text().split()) == {"seen", "beside"}


def test_the_guard_finds_what_it_imports_where_its_owner_does(tmp_path: Path) -> None:
    """As after `pip install --user` or `--target`, which an isolated interpreter does not look at."""
    (tmp_path / "psutil.py").write_text("raise SystemExit(77)")
    with GuardedProcess([sys.executable, "-c", ""], environment={"PYTHONPATH": str(tmp_path)}) as running:
        assert running.wait(PATIENCE_SECONDS) == 77


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_the_death_of_the_owner_ends_all_of_it(tmp_path: Path, sign: signal.Signals) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, *command(tmp_path)], stderr=subprocess.DEVNULL)
    pids = started(tmp_path)
    owner.send_signal(sign)
    owner.wait(PATIENCE_SECONDS)
    assert_gone(pids)


def test_the_death_of_the_guard_ends_the_command(tmp_path: Path) -> None:
    with GuardedProcess(command(tmp_path), stop_seconds=0.5) as running:
        process, deaf, guard = started(tmp_path)
        os.kill(guard, signal.SIGKILL)
        assert running.wait(PATIENCE_SECONDS) == -signal.SIGKILL
        assert_gone([process])
    # Nobody is left who knows of it
    os.kill(deaf, signal.SIGKILL)
