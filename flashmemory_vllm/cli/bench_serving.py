"""Scenarios of the kind `serving` in `flashmemory bench`: `vllm bench serve` against one server after the other."""

import argparse
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self, get_args

import yaml

from flashmemory_vllm.benchmark.scenario import check_fields, read_fields
from flashmemory_vllm.benchmark.serving_client import ServingClient
from flashmemory_vllm.benchmark.serving_rows import ServingRow, format_serving_tables, load_serving_rows
from flashmemory_vllm.benchmark.serving_run import ServingRun
from flashmemory_vllm.benchmark.serving_scenario import (
    KIND,
    KV_BYTES_METHOD,
    ServedEngine,
    ServingCell,
    ServingScenario,
    make_serving_cells,
)
from flashmemory_vllm.cli.bench_choices import check_names, chosen_names, model_arguments
from flashmemory_vllm.cli.server import Server
from flashmemory_vllm.cli.shapes import shape_label, write_shape_tokenizer
from flashmemory_vllm.config import SECTION
from flashmemory_vllm.errors import ConfigError, FlashMemoryError
from flashmemory_vllm.evaluation.provenance import Provenance
from flashmemory_vllm.files import append_text, write_text
from flashmemory_vllm.processes.engine_log import find_error, has_failed

SERVED_NAME = "model"
# Whoever talks to a server sees its end before its processes are gone
ENDING_SECONDS = 5.0
POLL_SECONDS = 0.1


def is_asked_for(args: argparse.Namespace) -> bool:
    """Whether the command names scenarios or rows of this kind.

    Raises:
        ConfigError: it names others as well, asks for a picture of them, or a scenario cannot be read.
    """
    kinds = {read_fields(path).get("kind") for path in args.scenarios}
    if KIND in kinds and len(kinds) > 1:
        raise ConfigError("the scenarios are of several kinds: allowed is one kind in a run")
    is_it = KIND in kinds or (args.table is not None and _holds_rows(args.table))
    if is_it and args.plot is not None:
        raise ConfigError("--plot is given: there is no picture of serving scenarios")
    return is_it


def _holds_rows(path: Path) -> bool:
    try:
        return bool(load_serving_rows(path))
    except ConfigError:
        return False


def run(args: argparse.Namespace) -> str:
    """Measure, or read what there is.

    Args:
        args: of `flashmemory bench`.

    Returns:
        The tables.

    Raises:
        ConfigError: a scenario or an option makes no sense.
    """
    return format_serving_tables(load_serving_rows(args.table) if args.table is not None else _measure(args))


def _measure(args: argparse.Namespace) -> list[ServingRow]:
    scenarios = [check_fields(ServingScenario, path, read_fields(path, args.settings)) for path in args.scenarios]
    check_names([scenario.name for scenario in scenarios])
    engines = None if args.engines is None else _read_engines(args.engines)
    model = model_arguments(args.model, args.shape, args.layers)
    cells = [cell for scenario in scenarios for cell in make_serving_cells(scenario, engines, model)]
    if args.only is not None:
        wanted = chosen_names("--only", args.only, [_name(cell) for cell in cells])
        cells = [cell for cell in cells if _name(cell) in wanted]
    if args.shape is not None:
        write_shape_tokenizer(Path(model["model"]), args.shape)
    return ServingRun(
        shape_label(args.shape, args.layers) if args.shape else Path(model["model"]).name,
        args.out,
        Provenance.collect_elsewhere(["flashmemory", *sys.argv[1:]], args.commit),
        lambda cell: BenchServer(cell, args.startup_seconds, args.log),
        ServingClient(SERVED_NAME, args.log).send,
        args.resume,
        args.time_limit,
    ).run(cells)


def _read_engines(text: str) -> list[ServedEngine]:
    known: dict[str, ServedEngine] = {name: name for name in get_args(ServedEngine)}
    return [known[name] for name in chosen_names("--engines", text, known)]


def _name(cell: ServingCell) -> str:
    return f"{cell.scenario.name}/{cell.load.name}"


class BenchServer:
    """The server of a cell, for as long as a `with` block lasts.

    Args:
        cell: what to serve, and how.
        startup_seconds: how long to wait until it is up.
        log: file that what it prints is appended to. Default: none is kept.
    """

    def __init__(self, cell: ServingCell, startup_seconds: float, log: Path | None = None) -> None:
        self._cell = cell
        self._startup_seconds = startup_seconds
        self._kept_log = log

    def __enter__(self) -> Self:
        with ExitStack() as started:
            folder = Path(started.enter_context(tempfile.TemporaryDirectory(prefix="flashmemory-serving-")))
            self._log = folder / "log"
            started.callback(self._keep_log)
            config = folder / "serve.yaml"
            write_text(config, yaml.safe_dump(dict(self._cell.options), sort_keys=False))
            try:
                self._server = started.enter_context(self._make_server(config))
            except ConfigError:
                raise
            except FlashMemoryError as error:
                raise FlashMemoryError(find_error(self._printed()) or str(error)) from error
            self._running = started.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.close()

    @property
    def url(self) -> str:
        """Where it listens."""
        return self._server.url

    def read_metrics(self) -> dict[str, float]:
        """Value of every sample on `/metrics`, summed over labels."""
        return self._server.read_metrics()

    def read_kv_bytes(self) -> int:
        """Device bytes of KV pages and states on the first rank."""
        return int(self._server.call_workers(KV_BYTES_METHOD)[0])

    def complete(self, prompt_ids: list[int], max_tokens: int) -> str:
        """Ask for a greedy completion."""
        return self._server.complete(prompt_ids, max_tokens)

    def end_reason(self) -> str | None:
        """Why it has ended or failed, in one line; None if it still serves some seconds from now."""
        deadline = time.monotonic() + ENDING_SECONDS
        while not self._server.has_ended() and not has_failed(self._printed()):
            if time.monotonic() > deadline:
                return None
            time.sleep(POLL_SECONDS)
        return find_error(self._printed()) or "the server has ended"

    def _make_server(self, config: Path) -> Server:
        folder = Path(self._cell.model)
        plugins = SECTION if self._cell.engine == "flashmemory" else ""
        return Server(
            folder if folder.is_dir() else self._cell.model,
            config,
            self._startup_seconds,
            # The routes for developers tell the bytes of the KV cache
            {**os.environ, "VLLM_PLUGINS": plugins, "VLLM_SERVER_DEV_MODE": "1"},
            name=SERVED_NAME,
            log=self._log,
        )

    def _printed(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""

    def _keep_log(self) -> None:
        if self._kept_log is not None:
            append_text(self._kept_log, self._printed())
