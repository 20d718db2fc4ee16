"""A server that is killed takes its engine core and its worker along, which hold all the memory."""

import subprocess
import sys
from pathlib import Path

import psutil

from flashmemory_vllm.reference import reference_model_path
from tests.e2e.conftest import CONFIG
from tests.unit.processes.test_guarded import PATIENCE_SECONDS, assert_gone, wait_until


def test_nothing_is_left_of_a_killed_server(environment: dict[str, str], tmp_path: Path) -> None:
    """In any phase: killed as soon as there is a worker, which begins to load the model."""
    vllm = Path(sys.executable).with_name("vllm")
    command = [str(vllm), "serve", str(reference_model_path()), "--config", str(CONFIG), "--port", "0"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    children: list[psutil.Process] = []
    try:
        wait_until(lambda: "Starting to load model" in (tmp_path / "log").read_text(), "a worker is there")
        children = psutil.Process(server.pid).children(recursive=True)
        titles = [" ".join(child.cmdline()) for child in children]
        assert any("EngineCore" in title for title in titles)
        assert any("Worker" in title for title in titles)
        server.kill()
        server.wait(PATIENCE_SECONDS)
        assert_gone([child.pid for child in children])
    finally:
        server.kill()
        for child in children:
            if child.is_running():
                child.kill()
