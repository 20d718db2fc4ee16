"""Every command of the README, the quick start and the capacity page is run here, or it says why it cannot be."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from tests.docs.pages import DOCS, QUICK_START, README, ROOT, code_blocks, commands
from tests.helpers.entry_points import entry_point_folder
from tests.unit.deploy.serve import parse_arguments

CAPACITY = DOCS / "capacity.md"
COMMANDS = {command for page in (CAPACITY, QUICK_START, README) for command in commands(page)}
SHELL = ("/bin/bash", "-o", "pipefail", "-c")
STARTUP_SECONDS = 1200
PAGE_ADDRESS = "localhost:8000"

SERVE = 'vllm serve "$(flashmemory reference path)" --config configs/reference.yaml --served-model-name reference'
PLUGINS = "export VLLM_PLUGINS=flashmemory"
DEMO = "flashmemory demo --tokens 32768"
NEEDS_WEIGHTS = "needs a GPU and weights of many GiB; vLLM's own parser reads it below"
NOT_RUN = {
    "make demo": "installs an environment of several GiB; what it starts then is started below, with twice the tokens",
    "make test": "this test is a part of it",
    "source .venv/bin/activate": "the environment of the tests takes its place",
    "pip install '.[cuda]'": "installs vLLM's CUDA build",
    SERVE.removesuffix(
        " --served-model-name reference"
    ): "the quick start's line, which is run, names the model as well",
    "vllm serve meta-llama/Llama-3.1-8B-Instruct --attention-backend flashmemory": NEEDS_WEIGHTS,
    "vllm serve --config configs/llama-3.1-8b.yaml": NEEDS_WEIGHTS,
    "vllm serve --config configs/qwen3-8b.yaml": NEEDS_WEIGHTS,
}
PLANS = sorted(command for command in COMMANDS if command.startswith("flashmemory plan "))
QUESTIONS = sorted(command for command in COMMANDS if command.startswith("curl "))
RUN = {*PLANS, *QUESTIONS, "flashmemory doctor", DEMO, SERVE, PLUGINS}


class QuickStart(NamedTuple):
    """The server of the quick start: where it listens, and the file of its log."""

    address: str
    log: Path


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a shell has once the environment of the quick start is active; our plugin need not be installed."""
    folder = tmp_path_factory.mktemp("bin")
    command = folder / "flashmemory"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m flashmemory_vllm.cli.app "$@"\n')
    command.chmod(0o755)
    python = [str(entry_point_folder()), str(ROOT), str(ROOT / "kernels")]
    return dict(os.environ) | {
        "PATH": os.pathsep.join((str(folder), str(Path(sys.executable).parent), os.environ["PATH"])),
        "PYTHONPATH": os.pathsep.join(python),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def run_in_shell(command: str, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run a command as a page has it, in a checkout."""
    return subprocess.run([*SHELL, command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def quick_start(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[QuickStart]:
    """The server, started by the page's own lines, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*SHELL, f"{PLUGINS}\n{SERVE} --port {port}"],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"localhost:{port}"
    try:
        _wait_until_healthy(process, f"http://{address}/health", log)
        yield QuickStart(address, log)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def _wait_until_healthy(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    end = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            httpx.get(url).raise_for_status()
        except httpx.HTTPError:
            time.sleep(1)
        else:
            return
    pytest.fail(f"the server did not start:\n{log.read_text()[-4000:]}")


def test_every_command_is_run_or_has_a_reason() -> None:
    assert RUN | NOT_RUN.keys() == COMMANDS
    assert not RUN & NOT_RUN.keys()


@pytest.mark.parametrize("command", [name for name, reason in NOT_RUN.items() if reason == NEEDS_WEIGHTS])
def test_vllm_reads_what_cannot_be_served_here(command: str) -> None:
    _, _, *arguments = shlex.split(command)
    parse_arguments(arguments)


@pytest.mark.parametrize("command", PLANS)
def test_a_plan_is_what_the_page_shows(command: str, environment: dict[str, str]) -> None:
    done = run_in_shell(command, environment)
    assert done.returncode == 0, done.stderr
    if "--gpu-memory-gib" in command:
        texts = [block.text for page in (README, CAPACITY) for block in code_blocks(page)]
        assert [text for text in texts if text.startswith("device memory")] == [done.stdout] * 2
        return
    # Shown as a line of a table
    plan = dict(line.split("  ", 1) for line in done.stdout.splitlines() if "  " in line)
    slots, keys, blocks, requests = (
        plan[name].split(" (")[0].strip() for name in ("device slots", "index keys", "host blocks", "requests at once")
    )
    assert f"| {slots} | {keys} | {blocks} | {requests} |" in CAPACITY.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_doctor_runs(environment: dict[str, str]) -> None:
    done = run_in_shell("flashmemory doctor", environment)
    assert done.returncode in {0, 1}, done.stderr
    assert "vLLM's seams" in done.stdout


@pytest.mark.e2e
@pytest.mark.slow
def test_the_demo_of_the_quick_start(environment: dict[str, str]) -> None:
    done = run_in_shell(DEMO, environment)
    assert done.returncode == 0, done.stdout + done.stderr
    asked, question, model, right, resident, device = done.stdout.splitlines()
    assert asked.endswith("in 32,768 tokens")
    assert question.startswith("question      ASK ")
    assert f"right answer  {model.removeprefix('model         ')}   (the same)" == right
    assert re.fullmatch(r"resident      \d+ of 1024 blocks: 1[0-3]\.\d% of its KV", resident)
    assert device == "device        144 slots: 7.1 times smaller than this request's KV"


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("command", QUESTIONS)
def test_the_server_of_the_quick_start_answers(
    command: str, quick_start: QuickStart, environment: dict[str, str]
) -> None:
    assert PAGE_ADDRESS in command
    done = run_in_shell(command.replace(PAGE_ADDRESS, quick_start.address), environment)
    assert done.returncode == 0, done.stderr
    expected = {"/v1/completions": '"text":', "/metrics": "flashmemory:slots_total{", "/stats": '"slots_total":'}
    (said,) = [text for route, text in expected.items() if f"{route} " in f"{command} "]
    assert said in done.stdout


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("page", [README, QUICK_START], ids=lambda page: page.name)
def test_the_server_has_the_sizes_that_the_page_shows(page: Path, quick_start: QuickStart) -> None:
    (shown,) = [" ".join(block.text.split()) for block in code_blocks(page) if block.text.startswith("flashmemory: ")]
    assert shown in quick_start.log.read_text()
