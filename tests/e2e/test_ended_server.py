"""A server that loses a process, or is told to end, while it decodes: what its client gets, and what is left of it."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flashmemory_vllm.cli.server import MODEL_NAME
from flashmemory_vllm.evaluation.vocabulary import BOS, encode
from flashmemory_vllm.reference import reference_model_path
from tests.e2e.conftest import CONFIG
from tests.e2e.questions import make_questions
from tests.unit.processes.test_guarded import PATIENCE_SECONDS, assert_gone, wait_until

MANY_TOKENS, SOME_TOKENS = 25_000, 300
# Which process gets which signal
FAULTS: Mapping[str, tuple[str, signal.Signals]] = {
    "worker killed": ("Worker", signal.SIGKILL),
    "engine core killed": ("EngineCore", signal.SIGKILL),
    "told to end": ("", signal.SIGTERM),
}


class Ended:
    """A server that was decoding when it was hit."""

    def __init__(self, fault: str, environment: Mapping[str, str], folder: Path) -> None:
        self._title, self._signal = FAULTS[fault]
        self._log = folder / "log"
        vllm = Path(sys.executable).with_name("vllm")
        command = [str(vllm), "serve", str(reference_model_path()), "--config", str(CONFIG), "--port", "0"]
        command += ["--served-model-name", MODEL_NAME, "--shutdown-timeout", str(PATIENCE_SECONDS)]
        with self._log.open("w") as log:
            self._server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.processes: list[psutil.Process] = []
        self.events: list[dict[str, Any]] = []
        try:
            self._decode_and_hit()
            self.exit_code = self._server.wait(PATIENCE_SECONDS)
            assert_gone([process.pid for process in self.processes])
        finally:
            self._server.kill()
            for process in self.processes:
                if process.is_running():
                    process.kill()

    @property
    def num_answers(self) -> int:
        """Events of the stream that hold tokens, one or more each."""
        return sum("choices" in event for event in self.events)

    def _decode_and_hit(self) -> None:
        wait_until(lambda: self._port() > 0 or self._server.poll() is not None, "the server is up")
        self.processes = psutil.Process(self._server.pid).children(recursive=True)
        hit = [psutil.Process(self._server.pid)]
        if self._title:
            hit = [process for process in self.processes if self._title in " ".join(process.cmdline())]
        (question,) = make_questions("late", 2000, 1, seed=1)
        ends_by_itself = not self._title
        body = {"model": MODEL_NAME, "prompt": [BOS, *encode(question.prompt)], "stream": True, "ignore_eos": True}
        body |= {"max_tokens": SOME_TOKENS if ends_by_itself else MANY_TOKENS}
        url = f"http://127.0.0.1:{self._port()}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=PATIENCE_SECONDS) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    self.events.append(json.loads(line.removeprefix("data: ")))
                if self.num_answers == 2 and hit:
                    hit.pop().send_signal(self._signal)

    def _port(self) -> int:
        """The one that it listens on, once it answers."""
        for connection in psutil.Process(self._server.pid).net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN:
                port: int = connection.laddr.port
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health", timeout=PATIENCE_SECONDS).is_success:
                        return port
                except httpx.TransportError:
                    continue
        return 0


@pytest.fixture(scope="module")
def ended(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ended]]:
    """One server for each fault; most of a start is waiting, so all start together."""
    folders = {fault: tmp_path_factory.mktemp(fault.replace(" ", "-")) for fault in FAULTS}
    with ThreadPoolExecutor(len(FAULTS)) as pool:
        yield dict(zip(FAULTS, pool.map(lambda fault: Ended(fault, environment, folders[fault]), FAULTS), strict=True))


@pytest.mark.parametrize("fault", ["worker killed", "engine core killed"])
def test_a_killed_process_ends_the_server_and_tells_the_client(ended: dict[str, Ended], fault: str) -> None:
    one = ended[fault]
    assert "EngineCore encountered an issue" in one.events[-1]["error"]["message"]
    assert one.num_answers < MANY_TOKENS


def test_a_server_that_is_told_to_end_finishes_what_it_answers(ended: dict[str, Ended]) -> None:
    one = ended["told to end"]
    # It has written all tokens that it was asked for; an event of the stream may hold several
    assert one.events[-1]["choices"][0]["finish_reason"] == "length"
    assert one.exit_code == 0
