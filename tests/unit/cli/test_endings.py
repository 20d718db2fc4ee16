"""Every command that starts an engine or a server leaves none behind, whatever ends it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.processes.test_guarded import PATIENCE_SECONDS, assert_gone, wait_until

ROOT = Path(__file__).parents[3]
# The command line, with stand-ins for what it starts
COMMAND = """
import sys
from flashmemory_vllm.benchmark import process
from flashmemory_vllm.cli import accuracy_starts, app, capture
process.WORKER_MODULE = accuracy_starts.WORKER_MODULE = capture.WORKER_MODULE = "tests.unit.cli.hanging_engine"
sys.executable = sys.argv[1]
sys.exit(app.main(sys.argv[2:]))
"""
COMMANDS = {
    "accuracy": "accuracy --out {folder}/rows.json --selectors streaming --tokens 1024 --commit c",
    "bench": "bench configs/bench/smoke.yaml --engines flashmemory --out {folder}/rows.json --commit c",
    "capture": "capture --out {folder}/data",
    "demo": "demo",
    "eval": "eval --out {folder}/eval --suites needles --commit c",
}
ENDINGS = [
    *((command, signal.SIGKILL) for command in COMMANDS),
    ("bench", signal.SIGHUP),
    ("capture", signal.SIGINT),
    ("demo", signal.SIGTERM),
]


@pytest.mark.parametrize(("command", "sign"), ENDINGS)
def test_nothing_is_left_of_what_a_command_started(command: str, sign: signal.Signals, tmp_path: Path) -> None:
    python, vllm = tmp_path / "python", tmp_path / "vllm"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    vllm.write_text(f"#!/bin/sh\nexec {sys.executable} -m tests.unit.cli.hanging_engine\n")
    for program in (python, vllm):
        program.chmod(0o755)
    words = COMMANDS[command].format(folder=tmp_path).split()
    environment = dict(os.environ) | {"HANGING_ENGINE": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, str(python), *words],
            cwd=ROOT,
            env=environment | {"HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=log,
        )
    try:
        wait_until(lambda: (tmp_path / "pids").exists() or process.poll() is not None, "it has started something")
        assert process.poll() is None, (tmp_path / "log").read_text()
        process.send_signal(sign)
        code = process.wait(PATIENCE_SECONDS)
    finally:
        process.kill()
    assert code == (-sign if sign == signal.SIGKILL else 128 + sign), (tmp_path / "log").read_text()
    assert_gone([int(pid) for pid in (tmp_path / "pids").read_text().split()])
