"""Exact-match accuracy of every selector, task and prompt length, beside dense attention's.

One engine serves many cells: between two settings it only swaps its runtime. Many questions share a context, so
that the prefix cache pays for the long prompts once a setting. Rows are written after each cell, and a cell that
has a row is not measured again.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from flashmemory_vllm.evaluation.accuracy_rows import (
    AccuracyRow,
    Setting,
    load_rows,
    save_rows,
    with_dense,
)
from flashmemory_vllm.evaluation.contexts import ContextShape
from flashmemory_vllm.evaluation.provenance import Provenance
from flashmemory_vllm.evaluation.tasks import (
    DEFAULT_FACT_SHARE,
    QUESTION_LENS,
    Sample,
    TaskName,
    facts_per_question,
    make_samples,
    num_facts,
    num_wrapper_tokens,
)

# The questions of the reference model's own evaluation, apart from every training seed
SEED = 20_260_609
QUESTIONS_PER_CONTEXT = 20
INDEX_BYTES_COUNTER = "index_bytes_per_block"


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
    task: TaskName
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
    """

    model: str
    block_size: int
    questions_per_context: int = QUESTIONS_PER_CONTEXT
    seed: int = SEED

    def samples(self, task: TaskName, tokens: int, questions: int) -> list[Sample]:
        """The questions of a cell, those about one context next to each other."""
        shared = min(self.questions_per_context, max_questions(task, tokens))
        return make_samples(task, tokens, questions, self.seed, questions_per_context=shared)

    def missing(self, cells: Sequence[Cell], rows: Sequence[AccuracyRow]) -> list[Cell]:
        """Cells that have no row yet. A row from before batches were told is one of any batch."""
        measured = {(row.setting, row.batch, row.questions_key) for row in rows}

        def is_missing(cell: Cell) -> bool:
            key = (self.model, self.block_size, cell.task, cell.tokens, cell.questions)
            return measured.isdisjoint({(cell.setting, cell.batch, key), (cell.setting, None, key)})

        return list(filter(is_missing, cells))


class AccuracyRun:
    """Measures cells that have no row yet.

    Args:
        generator: answers; reconfigured for each setting.
        conditions: what the cells have in common.
        provenance: where the rows come from.
        path: JSON file of the rows. Rows of other cells stay in it.
        deadline: no cell is begun after this time, in seconds since the epoch. Default: never.

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
                progress.set_postfix(accuracy=f"{self._rows[-1].accuracy:.3f}")
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
            self._generator.reconfigure(setting.options())
            yield from takewhile(lambda _: not self._is_late(), group)

    def _is_late(self) -> bool:
        return self._deadline is not None and time.time() > self._deadline

    def _measure(self, cell: Cell) -> AccuracyRow:
        samples = self._conditions.samples(cell.task, cell.tokens, cell.questions)
        before = self._generator.counters()
        waves = (samples[first : first + cell.batch] for first in range(0, len(samples), cell.batch))
        num_right = sum(map(self._num_right, waves))
        after = self._generator.counters()

        def counted(name: str) -> float:
            return after.get(name, 0.0) - before.get(name, 0.0)

        context = counted("decode_context_blocks_total")
        return AccuracyRow(
            model=self._conditions.model,
            block_size=self._conditions.block_size,
            task=cell.task,
            tokens=cell.tokens,
            questions=len(samples),
            batch=cell.batch,
            accuracy=num_right / len(samples),
            dense_accuracy=None,
            resident_share=counted("decode_resident_blocks_total") / context if context else None,
            recalled_blocks=int(counted("recalled_blocks_total")),
            device_bytes_index_per_block=after.get(INDEX_BYTES_COUNTER),
            **asdict(cell.setting),
            **asdict(self._provenance),
        )

    def _num_right(self, samples: Sequence[Sample]) -> int:
        """Ask all at once; how many answers are right from the first to the last token."""
        answers = self._generator.generate(
            [sample.prompt_ids.tolist() for sample in samples], [len(sample.answer_ids) for sample in samples]
        )
        return sum(answer == sample.answer_ids.tolist() for answer, sample in zip(answers, samples, strict=True))


def max_questions(task: TaskName, num_tokens: int) -> int:
    """How many questions of a task one context of `num_tokens` has different facts for; at least 1."""
    context_len = num_tokens - QUESTION_LENS[task] - num_wrapper_tokens(chat=False)
    shape = ContextShape.filling(context_len, DEFAULT_FACT_SHARE)
    return max(1, num_facts(task, shape) // facts_per_question(task))
