"""Everything that accuracy is measured on: the tasks that the reference model was trained on, and the paths."""

from typing import TYPE_CHECKING, get_args

from flashmemory_vllm.evaluation import paths, tasks
from flashmemory_vllm.evaluation.contexts import ContextShape
from flashmemory_vllm.evaluation.tasks import AnyTaskName, PathTaskName, Sample

if TYPE_CHECKING:
    from typing_extensions import TypeIs

ALL_TASK_NAMES: tuple[AnyTaskName, ...] = (*tasks.TASK_NAMES, *get_args(PathTaskName))


def make_questions(
    task: AnyTaskName, num_tokens: int, num_samples: int, seed: int, *, questions_per_context: int
) -> list[Sample]:
    """Generate samples of any task; see `tasks.make_samples` and `paths.make_path_samples`.

    Raises:
        ConfigError: the context is too short for the questions.
    """
    if _is_path(task):
        return paths.make_path_samples(task, num_tokens, num_samples, seed, questions_per_context=questions_per_context)
    return tasks.make_samples(task, num_tokens, num_samples, seed, questions_per_context=questions_per_context)


def max_questions(task: AnyTaskName, num_tokens: int) -> int:
    """How many questions of a task one context of `num_tokens` has different facts for; at least 1."""
    if _is_path(task):
        return max(1, paths.num_links(num_tokens))
    context_len = num_tokens - tasks.QUESTION_LENS[task] - tasks.num_wrapper_tokens(chat=False)
    shape = ContextShape.filling(context_len, tasks.DEFAULT_FACT_SHARE)
    return max(1, tasks.num_facts(task, shape) // tasks.facts_per_question(task))


def answer_len(task: AnyTaskName) -> int:
    """Tokens of an answer."""
    return paths.ANSWER_LENS[task] if _is_path(task) else tasks.ANSWER_LENS[task]


def score(sample: Sample, answer: list[int]) -> float:
    """How right an answer is, in 0 to 1.

    Args:
        sample: what was asked.
        answer: generated token ids.

    Returns:
        For a path the share of its tokens that are right at their places; for other tasks 1 if all tokens are
        right, from the first to the last, otherwise 0.
    """
    right = sample.answer_ids.tolist()
    if _is_path(sample.task):
        return paths.share_right(sample.task, answer, right)
    return float(answer == right)


def _is_path(task: AnyTaskName) -> "TypeIs[PathTaskName]":
    return task in get_args(PathTaskName)
