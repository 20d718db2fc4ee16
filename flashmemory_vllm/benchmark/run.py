"""Measures cells, a process for each engine configuration, and keeps every row as soon as it is there."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flashmemory_vllm.benchmark.cells import Cell, group_by_setup
from flashmemory_vllm.benchmark.process import EngineProcess, Job
from flashmemory_vllm.benchmark.rows import BenchRow, load_rows, measured_fields, save_rows, with_comparisons
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.provenance import Provenance

ProcessMaker = Callable[[Job], EngineProcess]


class BenchRun:
    """Measures cells and writes a row for each.

    Args:
        model: name of the model, for the rows.
        path: JSON file of the rows.
        provenance: where the rows come from.
        resume: keep the rows of the file and leave their cells out.
        time_limit: seconds after which no measurement begins, or None.
        start: makes an engine's process.

    Raises:
        ConfigError: on construction, the file exists and is not to be resumed, or holds something else.
    """

    def __init__(
        self,
        model: str,
        path: Path,
        provenance: Provenance,
        resume: bool = False,
        time_limit: float | None = None,
        start: ProcessMaker = EngineProcess,
    ) -> None:
        if path.exists() and not resume:
            raise ConfigError(f"--out is {path}: it exists; allowed is a new file, or --resume to go on with it")
        self._model = model
        self._path = path
        self._provenance = provenance
        self._deadline = None if time_limit is None else time.monotonic() + time_limit
        self._start = start
        self._rows = load_rows(path)

    def run(self, cells: Sequence[Cell]) -> list[BenchRow]:
        """Measure the cells that have no row, showing progress on standard error.

        Args:
            cells: of any number of scenarios.

        Returns:
            All rows of the file.
        """
        there = {row.key for row in self._rows if row.model == self._model}
        missing = [cell for cell in cells if cell.key not in there]
        with tqdm(total=len(missing), unit="row") as progress:
            for group in group_by_setup(missing):
                left = group
                while left and not self._is_late():
                    left = self._measure(left, progress)
        return self._rows

    def _measure(self, cells: list[Cell], progress: "tqdm[Any]") -> list[Cell]:
        """Run one process and return the cells that another one has to measure, because this one failed before."""
        progress.set_description(f"{cells[0].scenario} {cells[0].engine}: starting")
        begun, done = 0, 0
        with self._start(Job(cells[0].setup, [cell.work for cell in cells], self._deadline)) as process:
            for event in process.follow():
                cell = cells[event.place]
                if event.kind == "begin":
                    begun = event.place + 1
                    progress.set_description(f"{cell.scenario} {cell.engine} {cell.measurement}")
                    continue
                self._keep(cell, event.figures, progress)
                done = event.place + 1
            error = process.error()
        if error is None:
            # What the deadline left is left for another run
            return [] if self._is_late() else cells[done:]
        # An engine that did not start would not start again; a load that broke it is not tried twice
        failed = cells[done:] if begun == 0 else cells[done:begun]
        for cell in failed:
            self._keep(cell, {"error": error}, progress)
        return cells[done + len(failed) :]

    def _keep(self, cell: Cell, figures: Any, progress: "tqdm[Any]") -> None:  # noqa: ANN401 - JSON of another process
        work = cell.work
        row = BenchRow(
            scenario=cell.scenario,
            measurement=cell.measurement,
            engine=cell.engine,
            model=self._model,
            metric=cell.metric,
            target=cell.target,
            prompt_tokens=sum(work.prompt_lens),
            context=max(work.prompt_lens),
            batch=len(work.prompt_lens),
            output_tokens=work.output_tokens,
            **measured_fields(figures),
            **asdict(self._provenance),
        )
        self._rows = with_comparisons([*self._rows, row])
        save_rows(self._path, self._rows)
        progress.update()

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline
