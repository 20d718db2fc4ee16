"""Suite `needles`: one fact of a long context is asked for, at every depth and length of a grid.

Kamradt, "Needle in a haystack", 2023 (https://github.com/gkamradt/LLMTest_NeedleInAHaystack). Here one context holds
the facts of all depths and is asked for each of them, so that the prefix cache pays for a long prompt once, and each
needle lies among others like it, which is harder.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Protocol

import numpy as np
from tqdm import tqdm

from flashmemory_vllm.evaluation.contexts import ContextBatch, ContextShape, build_contexts
from flashmemory_vllm.evaluation.eval_rows import Figures
from flashmemory_vllm.evaluation.standard import run_all
from flashmemory_vllm.evaluation.target import Target
from flashmemory_vllm.evaluation.tasks import (
    DEFAULT_FACT_SHARE,
    QUESTION_LENS,
    TaskName,
    ask,
    make_samples,
    num_wrapper_tokens,
    wrap,
)
from flashmemory_vllm.evaluation.vocabulary import decode

TASK = "needle"
_PARITY_TASKS: tuple[TaskName, ...] = ("late", "multiquery", "multivalue", "tracking")


@dataclass(frozen=True, slots=True)
class Needle:
    """One question.

    Attributes:
        prompt_ids: token ids of the whole prompt.
        answer: words that the answer must hold in this order, separated by spaces.
        max_tokens: tokens to generate at most.
    """

    prompt_ids: Sequence[int]
    answer: str
    max_tokens: int

    def is_right(self, text: str) -> bool:
        """Whether a text holds the answer, whatever its spaces and line breaks."""
        return self.answer in " ".join(text.split())


class Questions(Protocol):
    """Makes questions in a language that a model knows. The same arguments give the same questions."""

    @property
    def language(self) -> str:
        """Its name."""

    def needles(self, tokens: int, depths: Sequence[float], seed: int) -> list[Needle]:
        """One context, asked for the fact at each depth.

        Args:
            tokens: tokens of a prompt, about.
            depths: shares of the context that lie before a fact, 0 to 1, all different.
            seed: of the context.

        Raises:
            ConfigError: the context is too short.
        """

    def continuations(self, tokens: int, count: int, seed: int) -> list[Sequence[int]]:
        """Token ids of prompts with long answers.

        Args:
            tokens: tokens of a prompt, about.
            count: prompts.
            seed: of all that is drawn.
        """


class ReferenceQuestions:
    """Questions in the language of the reference model, of exactly the tokens asked for."""

    language = "reference"

    def needles(self, tokens: int, depths: Sequence[float], seed: int) -> list[Needle]:
        """See `Questions`. Facts lie at random: of each depth the nearest is asked for."""
        length = tokens - QUESTION_LENS["multikey"] - num_wrapper_tokens(chat=False)
        shape = ContextShape.filling(length, DEFAULT_FACT_SHARE)
        context = build_contexts(np.random.default_rng([seed, tokens]), 1, length, shape)
        return [_needle(context, fact) for fact in _nearest(context, depths)]

    def continuations(self, tokens: int, count: int, seed: int) -> list[Sequence[int]]:
        """See `Questions`. The four tasks with the longest answers take turns."""
        tasks = [_PARITY_TASKS[index % len(_PARITY_TASKS)] for index in range(count)]
        return [make_samples(task, tokens, 1, seed + index)[0].prompt_ids.tolist() for index, task in enumerate(tasks)]


def _nearest(context: ContextBatch, depths: Sequence[float]) -> list[int]:
    """For each depth the index of the needle that starts nearest to it, none twice."""
    starts = context.starts[0, : context.shape.num_needles] / context.tokens.shape[1]
    free = set(range(len(starts)))
    chosen = []
    for depth in depths:
        # Without a free needle the context is too short, which `ask` tells
        fact = min(free, key=lambda index: abs(float(starts[index]) - depth), default=len(starts))
        free.discard(fact)
        chosen.append(fact)
    return chosen


def _needle(context: ContextBatch, fact: int) -> Needle:
    asked = ask("multikey", context, fact)
    (prompt,) = wrap(context.tokens, asked.question, chat=False)
    answer = asked.answer[0].tolist()
    # Without <end>, which the server takes as the stop token
    return Needle(prompt.tolist(), decode(answer[:-1]), len(answer))


@dataclass(frozen=True, slots=True)
class NeedlePart:
    """All depths of one length.

    Attributes:
        tokens: tokens of a prompt.
        depths: shares of the context that lie before a fact.
        contexts: contexts, each asked once for each depth.
        seed: of the first context.
        questions: makes the questions.
        num_concurrent: contexts that are asked at once.
    """

    tokens: int
    depths: Sequence[float]
    contexts: int
    seed: int
    questions: Questions
    num_concurrent: int

    def measure(self, target: Target) -> list[Figures]:
        """Ask one server; a figure for each depth.

        Raises:
            ConfigError: a prompt is too long for the server, or a context too short for so many depths.
            FlashMemoryError: the server failed.
        """
        needles = [self.questions.needles(self.tokens, self.depths, self.seed + i) for i in range(self.contexts)]
        longest = max(len(needle.prompt_ids) + needle.max_tokens for group in needles for needle in group)
        target.check_room(longest, "--lengths")
        answers: list[list[str]] = [[] for _ in needles]
        label = f"needles, {target.side}, {self.tokens:,} tokens"
        with tqdm(total=self.contexts * len(self.depths), desc=label, unit="q", leave=False) as progress:
            asks = [partial(self._ask, target, group, answers[i], progress.update) for i, group in enumerate(needles)]
            for _ in run_all(asks, self.num_concurrent):
                pass
        return [self._figures(index, needles, answers) for index in range(len(self.depths))]

    def _ask(self, target: Target, needles: Sequence[Needle], answers: list[str], done: Callable[[], object]) -> None:
        """One context after the other question: the first pays for the prefix."""
        for needle in needles:
            answers.append(target.complete(needle.prompt_ids, needle.max_tokens).text)
            done()

    def _figures(self, index: int, needles: Sequence[Sequence[Needle]], answers: Sequence[Sequence[str]]) -> Figures:
        asked = [(group[index], texts[index]) for group, texts in zip(needles, answers, strict=True)]
        right = [needle.is_right(text) for needle, text in asked]
        wrong = [
            {"expected": needle.answer, "answer": text.strip()}
            for (needle, text), is_right in zip(asked, right, strict=True)
            if not is_right
        ]
        return Figures(
            task=TASK,
            tokens=self.tokens,
            depth=self.depths[index],
            questions=len(asked),
            score=fmean(right),
            right=right,
            wrong=wrong,
        )
