"""A `vllm serve` process that lives as long as a `with` block, and the requests that the demo makes of it."""

import http.client
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from flashmemory_vllm.errors import ConfigError, FlashMemoryError
from flashmemory_vllm.processes.guarded import GuardedProcess

HOST = "127.0.0.1"
MODEL_NAME = "reference"
REQUEST_SECONDS = 900
# vLLM prints the cause first, in the process where it arose, then long echoes in two more
LOG_LINES = 60


class Server:
    """Starts on entering the block and waits for health; stops on leaving it, whatever happened inside.

    Args:
        model: folder of the model, or as text its Hugging Face id.
        config: YAML file for `vllm serve --config`.
        startup_seconds: how long to wait for health.
        environment: environment variables of the server. Default: those of this process.
        arguments: further arguments of `vllm serve`, which override those of the file.
        name: name of the model at the server.
        log: file for what the server prints. Default: one that is gone with the server.

    Raises:
        ConfigError: on construction, a file is missing.
    """

    def __init__(
        self,
        model: Path | str,
        config: Path,
        startup_seconds: float,
        environment: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        name: str = MODEL_NAME,
        log: Path | None = None,
    ) -> None:
        for path in (*([model / "config.json"] if isinstance(model, Path) else []), config):
            if not path.is_file():
                raise ConfigError(f"{path} does not exist: it is needed to start the server")
        self._name = name
        self._startup_seconds = startup_seconds
        self._port = _free_port()
        vllm = Path(sys.executable).with_name("vllm")
        self._command = [str(vllm), "serve", str(model), "--config", str(config)]
        self._command += ["--host", HOST, "--port", str(self._port), "--served-model-name", name]
        self._command += arguments
        self._environment = dict(os.environ if environment is None else environment)
        # Outlives every block of code here: closed with the server
        self._log: IO[str] = (
            tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
            if log is None
            else log.open("w+", encoding="utf-8")
        )
        self._process = GuardedProcess(self._command, self._log, self._environment)

    def __enter__(self) -> "Server":
        with ExitStack() as started:
            started.callback(self._log.close)
            started.enter_context(self._process)
            self._wait_until_healthy()
            self._running = started.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.close()

    @property
    def url(self) -> str:
        """Where the server listens."""
        return f"http://{HOST}:{self._port}"

    def read_metrics(self) -> dict[str, float]:
        """Value of every sample on `/metrics`, summed over labels."""
        values: dict[str, float] = {}
        for sample in self._samples():
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
        return values

    def read_block_size(self) -> int:
        """Tokens of a KV block."""
        name = "vllm:cache_config_info"
        return next(int(sample.labels["block_size"]) for sample in self._samples() if sample.name == name)

    def call_workers(self, method: str) -> list[str]:
        """Call a method of vLLM's workers; the server needs `VLLM_SERVER_DEV_MODE` in its environment.

        Returns:
            What it returned on each rank, as text.
        """
        answer = json.loads(self._request("POST", "/collective_rpc", json.dumps({"method": method})))
        return [str(result) for result in answer["results"]]

    def has_ended(self) -> bool:
        """Whether none of its processes runs any more."""
        return self._process.poll() is not None

    def _samples(self) -> list[Sample]:
        families = text_string_to_metric_families(self._request("GET", "/metrics").decode())
        return [sample for family in families for sample in family.samples]

    def complete(self, prompt_ids: list[int], max_tokens: int) -> str:
        """Ask for a greedy completion through the OpenAI-compatible API.

        Args:
            prompt_ids: token ids of the prompt.
            max_tokens: tokens to generate at most.

        Returns:
            What the model wrote, without special tokens.
        """
        body = {"model": self._name, "prompt": prompt_ids, "max_tokens": max_tokens, "temperature": 0}
        answer = json.loads(self._request("POST", "/v1/completions", json.dumps(body)))
        text: str = answer["choices"][0]["text"]
        return text

    def _request(self, method: str, path: str, body: str | None = None) -> bytes:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=REQUEST_SECONDS)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        if response.status != http.client.OK:
            detail = content.decode()
            raise FlashMemoryError(f"{method} {path} got status {response.status}: {detail}{self._log_excerpt()}")
        return content

    def _wait_until_healthy(self) -> None:
        started = time.monotonic()
        while (waited := time.monotonic() - started) < self._startup_seconds:
            if (code := self._process.poll()) is not None:
                raise FlashMemoryError(f"the server ended with code {code}{self._log_excerpt()}")
            _show_progress(f"starting vllm serve: {waited:.0f} s")
            if self._is_healthy():
                _show_progress(f"server is up after {waited:.0f} s\n")
                return
            time.sleep(1)
        raise FlashMemoryError(f"the server was not up after {self._startup_seconds:.0f} s{self._log_excerpt()}")

    def _is_healthy(self) -> bool:
        try:
            self._request("GET", "/health")
        except (ConnectionError, TimeoutError):
            return False
        return True

    def _log_excerpt(self) -> str:
        """The log from its first traceback on; without one, its end."""
        self._log.seek(0)
        lines = self._log.readlines()
        first = next((index for index, line in enumerate(lines) if "Traceback (most" in line), -LOG_LINES)
        return "\n" + "".join(lines[first:][:LOG_LINES])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def _show_progress(line: str) -> None:
    """Rewrite the line on a terminal; elsewhere print only what ends a line."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{line}")
    elif line.endswith("\n"):
        sys.stderr.write(line)
    sys.stderr.flush()
