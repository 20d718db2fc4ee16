"""Retrieval tasks over a context: how each asks, what it answers, and where the answer lies.

Every answer can be spelled by induction alone (find the last words, copy the word that followed), so that
a small model reaches full accuracy with dense attention and each miss of a sparse run is its own.

    multikey    ASK k k                       -> v v v <end>
    multivalue  EACH k k                      -> k k #1 v v v k k #2 v v v k k #3 v v v <end>
    multiquery  LIST @1 k k @2 k k @3 k k     -> @1 k k v v v @2 k k v v v @3 k k v v v <end>
    tracking    TRACE a a                     -> b b v v v <end>        (LET a a b b . and NEEDLE b b v v v .)
    late        LATER k k                     -> c0 c1 ... c143 k k v v v <end>

Modelled on RULER's niah_multikey, niah_multivalue, niah_multiquery and vt (arXiv 2404.06654). `late` asks for
the value only after more generated tokens than two selection periods of the longest default.
Two more tasks, which the reference model was not trained on, are in `evaluation/paths.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation import vocabulary as words
from flashmemory_vllm.evaluation.contexts import (
    KEY_WORDS,
    VALUE_WORDS,
    VALUES_PER_GROUP,
    ContextBatch,
    ContextShape,
    Ids,
    build_contexts,
)

TaskName = Literal["multikey", "multivalue", "multiquery", "tracking", "late"]
TASK_NAMES: tuple[TaskName, ...] = get_args(TaskName)
PathTaskName = Literal["path", "latepath"]
AnyTaskName = Literal[TaskName, PathTaskName]
FactKind = Literal["needle", "group", "chain"]

KEYS_PER_MULTIQUERY = 3
LATE_COUNT = 144
DEFAULT_FACT_SHARE = 0.2
_MAX_CHUNK_TOKENS = 1 << 18

_KEYED_ANSWER_LEN = 1 + KEY_WORDS + VALUE_WORDS
QUESTION_LENS: dict[TaskName, int] = dict.fromkeys(TASK_NAMES, 1 + KEY_WORDS) | {
    "multiquery": 1 + KEYS_PER_MULTIQUERY * (1 + KEY_WORDS)
}
ANSWER_LENS: dict[TaskName, int] = {
    "multikey": VALUE_WORDS + 1,
    "multivalue": VALUES_PER_GROUP * _KEYED_ANSWER_LEN + 1,
    "multiquery": KEYS_PER_MULTIQUERY * _KEYED_ANSWER_LEN + 1,
    "tracking": KEY_WORDS + VALUE_WORDS + 1,
    "late": LATE_COUNT + KEY_WORDS + VALUE_WORDS + 1,
}


@dataclass(frozen=True, slots=True)
class QuestionBatch:
    """One question to every row of a context batch.

    Attributes:
        task: name of the task.
        question: `[B, Q]` token ids.
        answer: `[B, A]` token ids, `<end>` included.
        items: the context items that hold the answer.
    """

    task: TaskName
    question: Ids
    answer: Ids
    items: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with its only right answer.

    Attributes:
        task: name of the task.
        prompt_ids: `[T]` token ids from `<bos>` to the last token before the answer.
        answer_ids: `[A]` token ids, `<end>` included where the answer has an end.
        needle_spans: token ranges `[start, stop)` in the prompt of the needles that hold the answer.
        num_shared_tokens: leading prompt tokens that all questions of the same context share.
    """

    task: AnyTaskName
    prompt_ids: Ids
    answer_ids: Ids
    needle_spans: tuple[tuple[int, int], ...]
    num_shared_tokens: int


def _join(batch_size: int, *parts: int | Sequence[int] | Ids) -> Ids:
    """Concatenate words and `[B, W]` arrays along the words; plain words are the same in every row."""
    columns = []
    for part in parts:
        ids = np.atleast_1d(np.asarray(part, np.int32))
        columns.append(ids if ids.ndim == 2 else np.broadcast_to(ids, (batch_size, len(ids))))
    return np.concatenate(columns, axis=1)


def fact_kind(task: TaskName) -> FactKind:
    """The kind of fact that a task asks for."""
    kinds: dict[TaskName, FactKind] = {"multivalue": "group", "tracking": "chain"}
    return kinds.get(task, "needle")


def facts_per_question(task: TaskName) -> int:
    """How many facts of its kind one question of a task uses up."""
    return KEYS_PER_MULTIQUERY if task == "multiquery" else 1


def num_facts(task: TaskName, shape: ContextShape) -> int:
    """How many facts of the kind that a task asks for a context has."""
    return {"needle": shape.num_needles, "group": shape.num_groups, "chain": shape.num_chains}[fact_kind(task)]


def ask(task: TaskName, context: ContextBatch, first_fact: int) -> QuestionBatch:
    """Ask every row of `context` for the fact (or facts) that begin at index `first_fact` of the task's kind.

    Facts are drawn and placed at random, so asking for them in order loses nothing.

    Raises:
        ConfigError: the context has too few facts of this kind.
    """
    available = num_facts(task, context.shape)
    if first_fact + facts_per_question(task) > available:
        raise ConfigError(
            f"{task} needs fact {first_fact} and {facts_per_question(task)} in all, context has {available}"
        )
    shape, keys, values = context.shape, context.keys, context.values
    size = len(keys)
    num_plain = shape.num_needles + shape.num_chains
    question: Ids
    answer: Ids
    items: tuple[int, ...] = (first_fact,)
    key, value = keys[:, first_fact], values[:, first_fact]
    if task == "multikey":
        question, answer = _join(size, words.ASK, key), _join(size, value, words.END)
    elif task == "late":
        counts = range(words.COUNT_0, words.COUNT_0 + LATE_COUNT)
        question, answer = _join(size, words.LATER, key), _join(size, counts, key, value, words.END)
    elif task == "multiquery":
        items = tuple(range(first_fact, first_fact + KEYS_PER_MULTIQUERY))
        ordinals = range(words.QUERY_ORDINAL_0, words.QUERY_ORDINAL_0 + KEYS_PER_MULTIQUERY)
        asked = [(ordinal, keys[:, item]) for ordinal, item in zip(ordinals, items, strict=True)]
        told = [(*pair, values[:, item]) for pair, item in zip(asked, items, strict=True)]
        question = _join(size, words.LIST, *(part for pair in asked for part in pair))
        answer = _join(size, *(part for triple in told for part in triple), words.END)
    elif task == "multivalue":
        key = keys[:, num_plain + first_fact]
        first_item = num_plain + first_fact * VALUES_PER_GROUP
        items = tuple(range(first_item, first_item + VALUES_PER_GROUP))
        spelled = [(key, words.VALUE_ORDINAL_0 + index, values[:, item]) for index, item in enumerate(items)]
        question = _join(size, words.EACH, key)
        answer = _join(size, *(part for triple in spelled for part in triple), words.END)
    else:
        target = shape.num_needles + first_fact
        items = (num_plain + shape.num_groups * VALUES_PER_GROUP + first_fact, target)
        question = _join(size, words.TRACE, keys[:, num_plain + shape.num_groups + first_fact])
        answer = _join(size, keys[:, target], values[:, target], words.END)
    return QuestionBatch(task, question, answer, items)


def wrap(prefix: Ids, question: Ids, *, chat: bool) -> Ids:
    """Prompt `[B, T]` of the context `prefix` and a question, raw or as one user turn of a chat."""
    size = len(prefix)
    if chat:
        return _join(size, (words.BOS, words.USER), prefix, question, words.ASSISTANT)
    return _join(size, words.BOS, prefix, question)


def num_wrapper_tokens(*, chat: bool) -> int:
    """Tokens that `wrap` adds."""
    return 3 if chat else 1


def iter_samples(
    task: TaskName,
    num_tokens: int,
    num_samples: int,
    seed: int,
    *,
    questions_per_context: int = 1,
    fact_share: float = DEFAULT_FACT_SHARE,
    chat: bool = False,
) -> Iterator[list[Sample]]:
    """Generate samples of one task in chunks; see `make_samples` for the arguments."""
    if task not in TASK_NAMES:
        raise ConfigError(f"task {task!r} is unknown, allowed: {', '.join(TASK_NAMES)}")
    rng = np.random.default_rng([seed, TASK_NAMES.index(task), num_tokens])
    context_len = num_tokens - QUESTION_LENS[task] - num_wrapper_tokens(chat=chat)
    shape = ContextShape.filling(context_len, fact_share)
    contexts_per_chunk = max(1, _MAX_CHUNK_TOKENS // num_tokens)
    remaining = num_samples
    while remaining > 0:
        num_contexts = min(contexts_per_chunk, -(-remaining // questions_per_context))
        context = build_contexts(rng, num_contexts, context_len, shape)
        facts = range(0, questions_per_context * facts_per_question(task), facts_per_question(task))
        asked = [ask(task, context, fact) for fact in facts]
        samples = [sample for question in asked for sample in _to_samples(context, question, chat=chat)]
        # question-major to context-major, so that the questions of a context follow each other
        samples = [samples[i::num_contexts][j] for i in range(num_contexts) for j in range(questions_per_context)]
        yield samples[:remaining]
        remaining -= len(samples)


def make_samples(
    task: TaskName,
    num_tokens: int,
    num_samples: int,
    seed: int,
    *,
    questions_per_context: int = 1,
    fact_share: float = DEFAULT_FACT_SHARE,
    chat: bool = False,
) -> list[Sample]:
    """Generate samples of one task; the same arguments give the same samples.

    Args:
        task: one of `TASK_NAMES`.
        num_tokens: exact tokens of each prompt, wrapper and question included.
        num_samples: samples in all.
        seed: seed of the generator, independent for each task and length.
        questions_per_context: consecutive samples that ask different questions of one context. Default: 1
        fact_share: share of the context that needles, groups and chains take up. Default: 0.2
        chat: wrap prompts as the chat template does. Default: False

    Returns:
        `num_samples` samples, those of one context next to each other.

    Raises:
        ConfigError: unknown task, or the context is too short for the question.
    """
    chunks = iter_samples(
        task,
        num_tokens,
        num_samples,
        seed,
        questions_per_context=questions_per_context,
        fact_share=fact_share,
        chat=chat,
    )
    return [sample for chunk in chunks for sample in chunk]


def _to_samples(context: ContextBatch, asked: QuestionBatch, *, chat: bool) -> list[Sample]:
    prompts = wrap(context.tokens, asked.question, chat=chat)
    num_before = 2 if chat else 1
    num_shared = num_before + context.tokens.shape[1]
    samples = []
    for row, (prompt, answer) in enumerate(zip(prompts, asked.answer, strict=True)):
        spans = (context.span(row, item) for item in asked.items)
        shifted = tuple((start + num_before, stop + num_before) for start, stop in spans)
        samples.append(Sample(asked.task, prompt, answer, shifted, num_shared))
    return samples
