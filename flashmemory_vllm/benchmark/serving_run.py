"""Loads one server after the other and keeps every row as soon as it is there."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from flashmemory_vllm.benchmark.serving_rows import (
    GIB,
    ServingRow,
    load_serving_rows,
    save_serving_rows,
    with_ratios,
)
from flashmemory_vllm.benchmark.serving_scenario import ServingCell
from flashmemory_vllm.errors import ConfigError, FlashMemoryError
from flashmemory_vllm.evaluation.provenance import Provenance

PREEMPTIONS = "vllm:num_preemptions_total"
# Long enough to be selected for; every vocabulary has these tokens
WARM_UP_ANSWER = 48
_WARM_UP_IDS = range(100, 1000)


class RunningServer(Protocol):
    """A server that is up."""

    @property
    def url(self) -> str:
        """Where it listens."""

    def read_metrics(self) -> dict[str, float]:
        """Value of every sample on `/metrics`, summed over labels."""

    def read_kv_bytes(self) -> int:
        """Device bytes of KV pages and states on the first rank."""

    def complete(self, prompt_ids: list[int], max_tokens: int) -> str:
        """Ask for a completion."""

    def end_reason(self) -> str | None:
        """Why it has ended or failed, in one line; None while it serves. Asked when something went wrong."""


ServerMaker = Callable[[ServingCell], AbstractContextManager[RunningServer]]
LoadSender = Callable[[ServingCell, str], Mapping[str, Any]]


class ServingRun:
    """Measures cells and writes a row for each.

    Args:
        model: name of the model, for the rows.
        path: JSON file of the rows.
        provenance: where the rows come from.
        start: makes the server of a cell; entering it raises a `FlashMemoryError` if it does not start.
        send: sends a cell's load to a URL and gives fields of its row; raises a `FlashMemoryError` if it fails.
        resume: keep the rows of the file and leave their cells out.
        time_limit: seconds after which no load begins, or None.

    Raises:
        ConfigError: on construction, the file exists and is not to be resumed, or holds something else.
    """

    def __init__(
        self,
        model: str,
        path: Path,
        provenance: Provenance,
        start: ServerMaker,
        send: LoadSender,
        resume: bool = False,
        time_limit: float | None = None,
    ) -> None:
        if path.exists() and not resume:
            raise ConfigError(f"--out is {path}: it exists; allowed is a new file, or --resume to go on with it")
        self._model = model
        self._path = path
        self._provenance = provenance
        self._start = start
        self._send = send
        self._deadline = None if time_limit is None else time.monotonic() + time_limit
        self._rows = load_serving_rows(path)

    def run(self, cells: Sequence[ServingCell]) -> list[ServingRow]:
        """Measure the cells that have no row, showing progress on standard error.

        Args:
            cells: of any number of scenarios.

        Returns:
            All rows of the file.

        Raises:
            ConfigError: a server cannot even be tried.
        """
        there = {row.key for row in self._rows if row.model == self._model}
        groups: dict[str, list[ServingCell]] = {}
        missing = [cell for cell in cells if cell.key not in there]
        for cell in missing:
            groups.setdefault(cell.server_key, []).append(cell)
        with tqdm(total=len(missing), unit="row") as progress:
            for group in groups.values():
                left = group
                while left and not self._is_late():
                    left = self._measure(left, progress)
        return self._rows

    def _measure(self, cells: list[ServingCell], progress: "tqdm[Any]") -> list[ServingCell]:
        """Run one server and return the cells that need another one, because a load broke this one."""
        progress.set_description(f"{cells[0].scenario.name} {cells[0].engine}: starting")
        with ExitStack() as running:
            try:
                server = running.enter_context(self._start(cells[0]))
            except ConfigError:
                raise
            except FlashMemoryError as error:
                # A server that did not start would not start again
                for cell in cells:
                    self._keep(cell, {"error": _first_line(error)}, progress)
                return []
            for place, cell in enumerate(cells):
                if self._is_late():
                    break
                progress.set_description(f"{cell.scenario.name} {cell.engine} {cell.load.name}")
                figures = self._figures(server, cell)
                self._keep(cell, figures, progress)
                if "error" in figures:
                    return cells[place + 1 :]
        return []

    def _figures(self, server: RunningServer, cell: ServingCell) -> dict[str, Any]:
        try:
            kv_bytes = server.read_kv_bytes()
            _warm_up(server, cell)
            before = server.read_metrics()[PREEMPTIONS]
            figures = dict(self._send(cell, server.url))
            if figures["failed"] and (reason := server.end_reason()) is not None:
                return {"error": reason}
            preemptions = int(server.read_metrics()[PREEMPTIONS] - before)
        except (FlashMemoryError, HTTPException, OSError) as error:
            return {"error": server.end_reason() or _first_line(error)}
        return figures | {"preemptions": preemptions, "device_kv_bytes": kv_bytes}

    def _keep(self, cell: ServingCell, figures: Mapping[str, Any], progress: "tqdm[Any]") -> None:
        scenario, load = cell.scenario, cell.load
        row = ServingRow(
            scenario=scenario.name,
            load=load.name,
            engine=cell.engine,
            model=self._model,
            requests=load.requests,
            prompt_tokens=load.prompt_tokens,
            answer_tokens=load.output_tokens,
            shared_prefix_tokens=load.shared_prefix_tokens,
            max_concurrency=load.max_concurrency,
            request_rate=load.request_rate,
            kv_memory_bytes=int((scenario.engine.kv_cache_memory_gib or 0) * GIB),
            itl_limit_ms=scenario.itl_limit_ms,
            ttft_limit_ms=scenario.ttft_limit_ms,
            target=load.target,
            **figures,
            **asdict(self._provenance),
        )
        self._rows = with_ratios([*self._rows, row])
        save_serving_rows(self._path, self._rows)
        progress.update()

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline


def _warm_up(server: RunningServer, cell: ServingCell) -> None:
    """What the first requests compile on their way is not measured."""
    num_requests, num_tokens = cell.load.warm_ups, cell.load.warm_up_tokens()
    if not num_requests:
        return
    draw = random.Random(cell.seed)
    prompts = [draw.choices(_WARM_UP_IDS, k=num_tokens) for _ in range(num_requests)]
    answer = min(cell.load.output_tokens or WARM_UP_ANSWER, WARM_UP_ANSWER)
    with ThreadPoolExecutor(num_requests) as pool:
        list(pool.map(lambda prompt: server.complete(prompt, answer), prompts))


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
