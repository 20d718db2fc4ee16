"""Runs `vllm bench serve`, vLLM's own load generator, against a server, and reads what it has measured."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flashmemory_vllm.benchmark.serving_scenario import ServingCell
from flashmemory_vllm.errors import FlashMemoryError
from flashmemory_vllm.files import append_text, write_text
from flashmemory_vllm.processes.engine_log import find_error
from flashmemory_vllm.processes.guarded import GuardedProcess

RESULT = "result.json"
TRACE = "trace.jsonl"
PERCENTILES = (50, 95, 99)
# Field of a row -> field of the result
_FIELDS = {
    "completed": "completed",
    "failed": "failed",
    "seconds": "duration",
    "input_tokens": "total_input_tokens",
    "output_tokens": "total_output_tokens",
    "requests_per_s": "request_throughput",
    "goodput_per_s": "request_goodput",
    "output_tokens_per_s": "output_throughput",
    "total_tokens_per_s": "total_token_throughput",
} | {f"{name}_p{share}_ms": f"p{share}_{name}_ms" for name in ("ttft", "itl") for share in PERCENTILES}


class ServingClient:
    """Sends loads to servers.

    Args:
        served_name: name of the model at the servers.
        log: file that what the clients print is appended to. Default: none is kept.
        program: `vllm`. Default: that of this Python.
    """

    def __init__(self, served_name: str, log: Path | None = None, program: Path | None = None) -> None:
        self._served_name = served_name
        self._log = log
        self._program = program or Path(sys.executable).with_name("vllm")

    def send(self, cell: ServingCell, url: str) -> dict[str, Any]:
        """Send a load and wait for its end.

        Args:
            cell: what to send.
            url: where the server listens.

        Returns:
            Figures by field of a row, in requests, seconds, milliseconds and tokens.

        Raises:
            FlashMemoryError: the client has failed, no request was answered, or the load took too long.
        """
        with tempfile.TemporaryDirectory(prefix="flashmemory-serving-") as name:
            folder = Path(name)
            if cell.load.lengths is not None:
                write_text(folder / TRACE, trace_of(cell))
            command = [str(self._program), "bench", "serve", *words(self.options(cell, url, folder))]
            self._run(command, folder, cell.load.time_limit_s)
            return figures_of(json.loads((folder / RESULT).read_text(encoding="utf-8")))

    def options(self, cell: ServingCell, url: str, folder: Path) -> dict[str, Any]:
        """Options of `vllm bench serve` by name; a list has several words, a flag is true."""
        scenario, load = cell.scenario, cell.load
        goodput = [f"tpot:{scenario.itl_limit_ms:g}"]
        if scenario.ttft_limit_ms is not None:
            goodput.append(f"ttft:{scenario.ttft_limit_ms:g}")
        limits = {"max-concurrency": load.max_concurrency, "request-rate": load.request_rate}
        return {
            "backend": "vllm",
            "base-url": url,
            "model": self._served_name,
            "tokenizer": cell.model,
            "num-prompts": load.requests,
            "seed": cell.seed,
            "temperature": 0,
            "ignore-eos": True,
            "disable-tqdm": True,
            **{name: value for name, value in limits.items() if value is not None},
            **_dataset(cell, folder),
            "percentile-metrics": "ttft,tpot,itl",
            "metric-percentiles": ",".join(map(str, PERCENTILES)),
            "goodput": goodput,
            "save-result": True,
            # Only there are the reasons of requests that failed
            "save-detailed": True,
            "result-dir": str(folder),
            "result-filename": RESULT,
            **load.client,
        }

    def _run(self, command: list[str], folder: Path, seconds: float) -> None:
        path = folder / "log"
        # Strings are the seeds of a trace's prompts: engines are to get the same ones
        environment = {**os.environ, "PYTHONHASHSEED": "0", "VLLM_PLUGINS": ""}
        try:
            with path.open("wb") as log, GuardedProcess(command, log, environment) as process:
                code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise FlashMemoryError(f"the load was given up after {seconds:g} s") from None
        finally:
            printed = path.read_text(encoding="utf-8", errors="replace")
            if self._log is not None:
                append_text(self._log, printed)
        if code != 0 or not (folder / RESULT).exists():
            raise FlashMemoryError(find_error(printed) or f"vllm bench serve ended with code {code}")


def _dataset(cell: ServingCell, folder: Path) -> dict[str, Any]:
    load = cell.load
    if load.lengths is not None:
        longest = load.warm_up_tokens()
        return {
            "dataset-name": "timed_trace",
            "dataset-path": str(folder / TRACE),
            "timed-trace-chunk-hash-size": longest,
            "no-self-timed": True,
        }
    if load.prompt_tokens is None:
        return {}
    return {
        "dataset-name": "random",
        "random-input-len": load.prompt_tokens - load.shared_prefix_tokens,
        "random-output-len": load.output_tokens,
        "random-prefix-len": load.shared_prefix_tokens,
        "random-range-ratio": load.spread,
    }


def trace_of(cell: ServingCell) -> str:
    """The load's lengths as a trace of vLLM's `timed_trace`, a prompt being one chunk that no other has."""
    lines = (
        {
            "timestamp": 0,
            "input_length": prompt,
            "output_length": answer,
            "hash_ids": [cell.seed * cell.load.requests + place],
        }
        for place, (prompt, answer) in enumerate(cell.load.read_lengths())
    )
    return "".join(f"{json.dumps(line)}\n" for line in lines)


def words(options: Mapping[str, Any]) -> list[str]:
    """Options as a command line has them; those that are false are left out."""
    return list(_words(options))


def _words(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if value is False:
            continue
        yield f"--{name}"
        if isinstance(value, dict):
            yield json.dumps(value)
        elif isinstance(value, list):
            yield from map(str, value)
        elif value is not True:
            yield str(value)


def figures_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a row from what `vllm bench serve` has saved.

    Raises:
        FlashMemoryError: no request was answered.
    """
    if not result["completed"]:
        told = next((error for error in result.get("errors", []) if error), "no reason was told")
        raise FlashMemoryError(f"no request was answered: {told.strip().splitlines()[-1]}")
    return {field: result[name] for field, name in _FIELDS.items()}
