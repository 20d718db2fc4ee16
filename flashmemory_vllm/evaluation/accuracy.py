"""Accuracy of every selector, task and prompt length, beside dense attention's.

One engine serves many cells: between two settings it only swaps its runtime. Many questions share a context, so
that the prefix cache pays for the long prompts once a setting. Rows are written after each cell, and a cell that
has a row is not measured again.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from flashmemory_vllm.evaluation.accuracy_rows import (
    AccuracyRow,
    Setting,
    load_rows,
    save_rows,
    with_dense,
)
from flashmemory_vllm.evaluation.device_share import why_unaffordable
from flashmemory_vllm.evaluation.provenance import Provenance
from flashmemory_vllm.evaluation.questions import make_questions, max_questions, score
from flashmemory_vllm.evaluation.tasks import AnyTaskName, Sample
from flashmemory_vllm.residency.budget import cdiv

# The questions of the reference model's own evaluation, apart from every training seed
SEED = 20_260_609
QUESTIONS_PER_CONTEXT = 20
INDEX_BYTES_COUNTER = "index_bytes_per_block"
FALLBACKS_COUNTER = 'dense_fallbacks_total{reason="score_share"}'
REFUSED_FALLBACKS_COUNTER = "refused_dense_fallbacks_total"


class Generator(Protocol):
    """An engine that can be asked and changed."""

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int] | int) -> list[list[int]]:
        """Continue each prompt greedily.

        Args:
            prompts: token ids.
            max_tokens: tokens to generate at most, for each prompt or for all.

        Returns:
            Generated ids for each prompt, the stop token included.
        """

    def reconfigure(self, options: Mapping[str, object]) -> None:
        """Go on with other options of our configuration and an empty prefix cache."""

    def counters(self) -> dict[str, float]:
        """Our metrics by name without the prefix, counted since the engine started."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure to measure.

    Attributes:
        setting: how a resident set is kept.
        task: name of the task.
        tokens: tokens of each prompt.
        questions: how many are asked.
        batch: requests that run at once; the next ones begin when all of these have ended.
    """

    setting: Setting
    task: AnyTaskName
    tokens: int
    questions: int
    batch: int


@dataclass(frozen=True, slots=True)
class Conditions:
    """What all cells of a run have in common.

    Attributes:
        model: name of the model, for the rows.
        block_size: tokens in a KV block.
        questions_per_context: most questions that share a context; fewer where it has fewer facts.
        seed: seed of contexts and questions.
        block_bytes: device bytes of a block's keys and values over all layers. Default: not known.
    """

    model: str
    block_size: int
    questions_per_context: int = QUESTIONS_PER_CONTEXT
    seed: int = SEED
    block_bytes: int | None = None

    def samples(self, task: AnyTaskName, tokens: int, questions: int) -> list[Sample]:
        """The questions of a cell, those about one context next to each other."""
        shared = min(self.questions_per_context, max_questions(task, tokens))
        return make_questions(task, tokens, questions, self.seed, questions_per_context=shared)

    def missing(self, cells: Sequence[Cell], rows: Sequence[AccuracyRow]) -> list[Cell]:
        """Cells that have no row yet. A row from before batches were told is one of any batch."""
        measured = {(row.setting, row.batch, row.questions_key) for row in rows}

        def is_missing(cell: Cell) -> bool:
            key = (self.model, self.block_size, cell.task, cell.tokens, cell.questions)
            return measured.isdisjoint({(cell.setting, cell.batch, key), (cell.setting, None, key)})

        return list(filter(is_missing, cells))

    def row(self, cell: Cell, provenance: Provenance, **measured: float | str | None) -> AccuracyRow:
        """A row of what was measured in a cell, fields of `AccuracyRow` by name."""
        fields: dict[str, Any] = {"dense_accuracy": None, "resident_share": None, "recalled_blocks": 0}
        return AccuracyRow(
            model=self.model,
            block_size=self.block_size,
            task=cell.task,
            tokens=cell.tokens,
            questions=cell.questions,
            batch=cell.batch,
            **fields | measured | asdict(cell.setting) | asdict(provenance),
        )

    def device_bytes(self, tokens: int, resident_share: float | None, index_bytes: float | None) -> int | None:
        """Device bytes of one prompt while it decodes, None if one of the figures is not known.

        Args:
            tokens: tokens of the prompt.
            resident_share: mean share of its blocks in the resident set.
            index_bytes: bytes of a block's index keys, which all blocks have.
        """
        if self.block_bytes is None or resident_share is None or index_bytes is None:
            return None
        return round(cdiv(tokens, self.block_size) * (resident_share * self.block_bytes + index_bytes))


class AccuracyRun:
    """Measures cells that have no row yet.

    Args:
        generator: answers; reconfigured for each setting.
        conditions: what the cells have in common.
        provenance: where the rows come from.
        path: JSON file of the rows. Rows of other cells stay in it.
        deadline: no cell is begun after this time, of `time.monotonic()`. Default: never.

    Raises:
        ConfigError: on construction, the file holds something else.
    """

    def __init__(
        self,
        generator: Generator,
        conditions: Conditions,
        provenance: Provenance,
        path: Path,
        deadline: float | None = None,
    ) -> None:
        self._generator = generator
        self._conditions = conditions
        self._provenance = provenance
        self._path = path
        self._deadline = deadline
        self._rows = load_rows(path)

    def run(self, cells: Sequence[Cell]) -> list[AccuracyRow]:
        """Measure what is missing, one setting after the other, showing progress.

        Returns:
            All rows of the file.
        """
        missing = self._conditions.missing(cells, self._rows)
        with tqdm(total=len(missing), unit="cell") as progress:
            for cell in self._in_turn(missing):
                progress.set_description(f"{cell.setting.selector} {cell.task} {cell.tokens:,}")
                self._rows = with_dense([*self._rows, self._measure(cell)])
                save_rows(self._path, self._rows)
                progress.set_postfix(accuracy=f"{self._rows[-1].accuracy or 0.0:.3f}")
                progress.update()
        return self._rows

    def _in_turn(self, cells: Sequence[Cell]) -> Iterator[Cell]:
        """Cells until the deadline, each while its setting is in force."""
        by_setting: dict[Setting, list[Cell]] = {}
        for cell in cells:
            by_setting.setdefault(cell.setting, []).append(cell)
        for setting, group in by_setting.items():
            if self._is_late():
                return
            self._generator.reconfigure(setting.all_options())
            yield from takewhile(lambda _: not self._is_late(), group)

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def _measure(self, cell: Cell) -> AccuracyRow:
        samples = self._conditions.samples(cell.task, cell.tokens, cell.questions)
        before = self._generator.counters()
        waves = (samples[first : first + cell.batch] for first in range(0, len(samples), cell.batch))
        total_score = sum(map(self._score, waves))
        after = self._generator.counters()

        def counted(name: str) -> float:
            return after.get(name, 0.0) - before.get(name, 0.0)

        context, index_bytes = counted("decode_context_blocks_total"), after.get(INDEX_BYTES_COUNTER)
        resident_share = counted("decode_resident_blocks_total") / context if context else None
        falls_back = cell.setting.fallback_share is not None
        return self._conditions.row(
            cell,
            self._provenance,
            accuracy=total_score / len(samples),
            resident_share=resident_share,
            recalled_blocks=int(counted("recalled_blocks_total")),
            device_bytes_index_per_block=index_bytes,
            device_bytes=self._conditions.device_bytes(cell.tokens, resident_share, index_bytes),
            fallbacks=int(counted(FALLBACKS_COUNTER)) if falls_back else None,
            refused_fallbacks=int(counted(REFUSED_FALLBACKS_COUNTER)) if falls_back else None,
        )

    def _score(self, samples: Sequence[Sample]) -> float:
        """Ask all at once; the sum of their scores."""
        answers = self._generator.generate(
            [sample.prompt_ids.tolist() for sample in samples], [len(sample.answer_ids) for sample in samples]
        )
        return sum(map(score, samples, answers))


def note_unaffordable(
    cells: Sequence[Cell], conditions: Conditions, origin: Callable[[], Provenance], path: Path
) -> list[Cell]:
    """Write a row without a figure for each cell whose share of the device's bytes leaves too few blocks.

    Args:
        cells: cells without a row.
        conditions: what they have in common.
        origin: tells where the rows come from, if there are any.
        path: file of the rows.

    Returns:
        The other cells.
    """
    reasons = {cell: why_unaffordable(cell.setting, cell.tokens, conditions.block_size) for cell in cells}
    affordable = [cell for cell in cells if reasons[cell] is None]
    if len(affordable) < len(cells):
        provenance = origin()
        rows = [
            conditions.row(cell, provenance, accuracy=None, not_measured=reason, device_bytes_index_per_block=None)
            for cell, reason in reasons.items()
            if reason is not None
        ]
        save_rows(path, with_dense([*load_rows(path), *rows]))
    return affordable
