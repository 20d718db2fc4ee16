"""`flashmemory plan --model ORG/NAME` downloads the configuration, and nothing else, through `huggingface_hub`."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flashmemory_vllm.cli.shapes import LLAMA_8B

MODEL = "some-org/some-model"
CONFIG = json.dumps(LLAMA_8B).encode()
ARGUMENTS = ("--gpu-memory-gib", "80", "--host-memory-gib", "128", "--context", "131072", "--json")


class Hub(BaseHTTPRequestHandler):
    """Has one file of one model, and remembers what it was asked for."""

    asked: set[str]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()
        if self.command == "GET" and self._has_file:
            self.wfile.write(CONFIG)

    @property
    def _has_file(self) -> bool:
        return self.path == f"/{MODEL}/resolve/main/config.json"

    def _answer(self) -> None:
        self.asked.add(self.path)
        self.send_response(200 if self._has_file else 404)
        self.send_header("Content-Length", str(len(CONFIG) if self._has_file else 0))
        self.send_header("ETag", '"one"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Print nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setattr(Hub, "asked", set(), raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def plan(hub: ThreadingHTTPServer, model: str, cache: Path) -> "subprocess.CompletedProcess[str]":
    """Run the command where the hub is ours: `huggingface_hub` reads its address when it is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(cache)}
    command = [sys.executable, "-m", "flashmemory_vllm.cli.app", "plan", "--model", model, *ARGUMENTS]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_an_id_is_planned_as_its_shape(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    done = plan(hub, MODEL, tmp_path)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["request_kv_bytes"] == 16 << 30
    assert made["serve_command"].startswith(f"vllm serve {MODEL} ")
    assert f"/{MODEL}/resolve/main/config.json" in Hub.asked
    assert not [path for path in Hub.asked if path.endswith((".safetensors", ".bin", "tokenizer.json"))]
    assert (tmp_path / "hub" / "models--some-org--some-model").is_dir()


def test_an_id_that_the_hub_does_not_have_is_one_line(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    done = plan(hub, "some-org/no-such-model", tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("flashmemory: --model is some-org/no-such-model: allowed is a model's folder or id")
