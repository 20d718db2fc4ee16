"""Exact-match accuracy of every selector, task and prompt length, beside dense attention's.

One engine serves all cells: between two selectors it only swaps its runtime. Many questions share a context,
so that the prefix cache pays for the long prompts once. Rows are written after each cell, and a cell that has
a row is not measured again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from flashmemory_vllm.evaluation.accuracy_rows import (
    DENSE,
    NEURAL,
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
    TaskName,
    facts_per_question,
    make_samples,
    num_facts,
    num_wrapper_tokens,
)

# The questions of the reference model's own evaluation, apart from every training seed
SEED = 20_260_609
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


def settings_of(
    selectors: Sequence[str],
    tau: int,
    ratio: float,
    groups: int,
    anchors: tuple[int, ...] | None = None,
    indexer: str | None = None,
) -> tuple[Setting, ...]:
    """One setting for each selector; the dense baseline comes first, at a ratio of 1 and in one layer group.

    A trained indexer brings its own anchor layers.
    """
    settings = (
        Setting(name, tau, ratio, groups, indexer=indexer)
        if name == NEURAL
        else Setting(name, tau, ratio, groups, anchors)
        for name in dict.fromkeys(selectors)
        if name != DENSE
    )
    dense = (Setting(DENSE, tau, 1.0, 1),) if DENSE in selectors else ()
    return (*dense, *settings)


@dataclass(frozen=True, slots=True)
class AccuracyPlan:
    """What to measure.

    Attributes:
        settings: each is measured on the same questions.
        tasks: names of the tasks.
        lengths: tokens of the prompts.
        num_questions: questions of each cell.
        questions_per_context: most questions that share a context; fewer where it has fewer facts.
        seed: seed of contexts and questions.
    """

    settings: tuple[Setting, ...]
    tasks: tuple[TaskName, ...]
    lengths: tuple[int, ...]
    num_questions: int = 200
    questions_per_context: int = 20
    seed: int = SEED


class AccuracyRun:
    """Measures the cells of a plan that have no row yet.

    Args:
        generator: answers; reconfigured for each setting.
        plan: what to measure.
        model: name of the model, for the rows.
        block_size: tokens in a KV block, for the rows.
        provenance: where the rows come from.
        path: JSON file of the rows. Rows of other plans stay in it.

    Raises:
        ConfigError: on construction, the file holds something else.
    """

    def __init__(
        self,
        generator: Generator,
        plan: AccuracyPlan,
        model: str,
        block_size: int,
        provenance: Provenance,
        path: Path,
    ) -> None:
        self._generator = generator
        self._plan = plan
        self._model = model
        self._block_size = block_size
        self._provenance = provenance
        self._path = path
        self._rows = load_rows(path)

    def run(self) -> list[AccuracyRow]:
        """Measure what is missing, one setting after the other, showing progress.

        Returns:
            All rows of the file with this model, block size and number of questions.
        """
        missing = {setting: list(self._missing(setting)) for setting in self._plan.settings}
        with tqdm(total=sum(map(len, missing.values())), unit="cell") as progress:
            for setting, cells in missing.items():
                if cells:
                    self._generator.reconfigure(setting.options())
                for task, tokens in cells:
                    progress.set_description(f"{setting.selector} {task} {tokens:,}")
                    self._rows = with_dense([*self._rows, self._measure(setting, task, tokens)])
                    save_rows(self._path, self._rows)
                    progress.set_postfix(accuracy=f"{self._rows[-1].accuracy:.3f}")
                    progress.update()
        shared = (self._model, self._block_size, self._plan.num_questions)
        return [row for row in self._rows if (row.model, row.block_size, row.questions) == shared]

    def _missing(self, setting: Setting) -> Iterator[tuple[TaskName, int]]:
        measured = {(row.setting, row.questions_key) for row in self._rows}
        for tokens in self._plan.lengths:
            for task in self._plan.tasks:
                key = (self._model, self._block_size, task, tokens, self._plan.num_questions)
                if (setting, key) not in measured:
                    yield task, tokens

    def _measure(self, setting: Setting, task: TaskName, tokens: int) -> AccuracyRow:
        samples = make_samples(
            task,
            tokens,
            self._plan.num_questions,
            self._plan.seed,
            questions_per_context=min(self._plan.questions_per_context, max_questions(task, tokens)),
        )
        before = self._generator.counters()
        answers = self._generator.generate(
            [sample.prompt_ids.tolist() for sample in samples], [len(sample.answer_ids) for sample in samples]
        )
        after = self._generator.counters()
        num_right = sum(answer == sample.answer_ids.tolist() for answer, sample in zip(answers, samples, strict=True))

        def counted(name: str) -> float:
            return after.get(name, 0.0) - before.get(name, 0.0)

        context = counted("decode_context_blocks_total")
        return AccuracyRow(
            model=self._model,
            block_size=self._block_size,
            task=task,
            tokens=tokens,
            questions=len(samples),
            accuracy=num_right / len(samples),
            dense_accuracy=None,
            resident_share=counted("decode_resident_blocks_total") / context if context else None,
            recalled_blocks=int(counted("recalled_blocks_total")),
            device_bytes_index_per_block=after.get(INDEX_BYTES_COUNTER),
            **asdict(setting),
            **asdict(self._provenance),
        )


def max_questions(task: TaskName, num_tokens: int) -> int:
    """How many questions of a task one context of `num_tokens` has different facts for; at least 1."""
    context_len = num_tokens - QUESTION_LENS[task] - num_wrapper_tokens(chat=False)
    shape = ContextShape.filling(context_len, DEFAULT_FACT_SHARE)
    return max(1, num_facts(task, shape) // facts_per_question(task))
