"""Training batches: many questions of mixed tasks over one random context a row, built ahead in threads."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt

from flashmemory_vllm.evaluation import vocabulary as words
from flashmemory_vllm.evaluation.contexts import ContextBatch, ContextShape, Ids, build_contexts
from flashmemory_vllm.evaluation.tasks import (
    ANSWER_LENS,
    LATE_COUNT,
    QUESTION_LENS,
    FactKind,
    QuestionBatch,
    TaskName,
    ask,
    fact_kind,
    facts_per_question,
    num_facts,
)

# A task joins at the length at which a context holds enough of its facts that elimination does not pay.
MIN_TASK_LEN: dict[TaskName, int] = {
    "multikey": 64,
    "multiquery": 256,
    "tracking": 256,
    "multivalue": 512,
    "late": 512,
}
_CHAT_SHARE = 0.3
_COUNT_WEIGHT = 0.1
_LATE_TAIL_LEN = 200
_MAX_TAIL_LEN = 2048


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """What the curriculum asks of one batch: its shape and how often each task should come up."""

    batch_size: int
    num_tokens: int
    task_weights: tuple[tuple[TaskName, float], ...]


@dataclass(frozen=True, slots=True)
class AnswerSpan:
    """Labels `[start, stop)` of one answer, the same in every row, indexed into `TrainingBatch.positions`."""

    task: TaskName
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Tokens and the positions that are trained.

    Attributes:
        plan: the plan that the batch follows.
        tokens: `[B, T]` token ids.
        positions: `[P]` index of each position whose *next* token is an answer token.
        labels: `[B, P]` those next tokens.
        weights: `[P]` loss weight of each.
        spans: the answers that the positions belong to.
    """

    plan: BatchPlan
    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    spans: tuple[AnswerSpan, ...]


def _num_tokens(task: TaskName, *, chat: bool) -> int:
    """Tokens of a question, its answer and, in a chat, its two turn markers."""
    return QUESTION_LENS[task] + ANSWER_LENS[task] + (2 if chat else 0)


def _fact_share(rng: np.random.Generator, num_tokens: int) -> float:
    """Dense with facts while contexts are short, so that there are always far more needles than questions."""
    for longest, low, high in ((512, 0.6, 0.9), (2048, 0.3, 0.7), (8192, 0.15, 0.5)):
        if num_tokens <= longest:
            return float(rng.uniform(low, high))
    return float(rng.uniform(0.1, 0.35))


def _draw_tasks(rng: np.random.Generator, plan: BatchPlan, *, chat: bool) -> list[TaskName]:
    """Tasks to ask one after another, within the tokens that the plan's length leaves for questions."""
    names = [task for task, _ in plan.task_weights if plan.num_tokens >= MIN_TASK_LEN[task]]
    chances = np.array([weight for task, weight in plan.task_weights if task in names])
    room = int(np.clip(plan.num_tokens * 0.2, 2 * _num_tokens("multikey", chat=chat), _MAX_TAIL_LEN))
    if "late" in names:
        room = max(room, _LATE_TAIL_LEN)
    tasks: list[TaskName] = []
    while True:
        task = names[int(rng.choice(len(names), p=chances / chances.sum()))]
        room -= _num_tokens(task, chat=chat)
        if room < 0:
            break
        tasks.append(task)
    rng.shuffle(tasks)
    return tasks or ["multikey"]


def _ask_all(context: ContextBatch, tasks: list[TaskName]) -> list[QuestionBatch]:
    """Ask the tasks in turn, each for facts that none before asked for."""
    used: dict[FactKind, int] = dict.fromkeys(get_args(FactKind), 0)
    asked = []
    for task in tasks:
        asked.append(ask(task, context, used[fact_kind(task)]))
        used[fact_kind(task)] += facts_per_question(task)
    return asked


def _affordable(tasks: list[TaskName], shape: ContextShape) -> list[TaskName]:
    """The tasks, less those that would ask for more than half of the facts of a kind."""
    used: dict[FactKind, int] = dict.fromkeys(get_args(FactKind), 0)
    kept = []
    for task in tasks:
        total = used[fact_kind(task)] + facts_per_question(task)
        if 2 * total <= num_facts(task, shape):
            used[fact_kind(task)] = total
            kept.append(task)
    return kept


def _assemble(plan: BatchPlan, context: ContextBatch, asked: list[QuestionBatch], *, chat: bool) -> TrainingBatch:
    """Lay out context, questions and answers, and point at the answer tokens."""

    def marker(token: int) -> Ids:
        return np.full((plan.batch_size, 1), token, np.int32)

    parts = [marker(words.BOS), *([marker(words.USER)] if chat else []), context.tokens]
    end = sum(part.shape[1] for part in parts)
    positions, weights, spans, num_positions = [], [], [], 0
    for turn, question in enumerate(asked):
        before = [question.question]
        if chat:
            before = [*([marker(words.USER)] if turn else []), question.question, marker(words.ASSISTANT)]
        end += sum(part.shape[1] for part in before)
        answer_len = question.answer.shape[1]
        positions.append(np.arange(end - 1, end - 1 + answer_len))
        weight = np.ones(answer_len, np.float32)
        if question.task == "late":
            weight[:LATE_COUNT] = _COUNT_WEIGHT
        weights.append(weight)
        spans.append(AnswerSpan(question.task, num_positions, num_positions + answer_len))
        num_positions += answer_len
        end += answer_len
        parts += [*before, question.answer]
    tokens = np.concatenate(parts, axis=1).astype(np.int64)
    at = np.concatenate(positions)
    labels = np.ascontiguousarray(tokens[:, at + 1])
    return TrainingBatch(plan, tokens, at, labels, np.concatenate(weights), tuple(spans))


def build_batch(plan: BatchPlan, seed: int, step: int) -> TrainingBatch:
    """Build the batch of one step; the same arguments give the same batch."""
    rng = np.random.default_rng([seed, step])
    chat = bool(rng.random() < _CHAT_SHARE)
    tasks = _draw_tasks(rng, plan, chat=chat)
    drawn_len = sum(_num_tokens(task, chat=chat) for task in tasks)
    only_needles = all(fact_kind(task) == "needle" for task in tasks)
    share = _fact_share(rng, plan.num_tokens)
    shape = ContextShape.filling(plan.num_tokens - drawn_len - 1, share, only_needles=only_needles)
    tasks = _affordable(tasks, shape) or ["multikey"]
    tail_len = sum(_num_tokens(task, chat=chat) for task in tasks)
    context = build_contexts(rng, plan.batch_size, plan.num_tokens - tail_len - 1, shape)
    return _assemble(plan, context, _ask_all(context, tasks), chat=chat)


class Prefetcher:
    """Builds batches ahead in worker threads; plans are asked for when a batch is begun."""

    def __init__(self, seed: int, first_step: int, make_plan: Callable[[int], BatchPlan], depth: int = 4) -> None:
        self._seed = seed
        self._make_plan = make_plan
        self._pool = ThreadPoolExecutor(max_workers=max(1, depth // 2))
        self._next_step = first_step
        self._pending: deque[Future[TrainingBatch]] = deque()
        for _ in range(depth):
            self._submit()

    def _submit(self) -> None:
        plan = self._make_plan(self._next_step)
        self._pending.append(self._pool.submit(build_batch, plan, self._seed, self._next_step))
        self._next_step += 1

    def __iter__(self) -> Iterator[TrainingBatch]:
        """Yield batches for ever, in the order of their steps."""
        while True:
            batch = self._pending.popleft().result()
            self._submit()
            yield batch

    def close(self) -> None:
        """Drop the batches that are still pending."""
        self._pool.shutdown(cancel_futures=True)
