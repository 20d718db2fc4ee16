"""Prompts for the reference model: all of its tasks, in mixed lengths."""

from collections.abc import Callable

from flashmemory_vllm.capture.prompts import Prompt
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation import vocabulary as words
from flashmemory_vllm.evaluation.accuracy import QUESTIONS_PER_CONTEXT, SEED
from flashmemory_vllm.evaluation.questions import max_questions
from flashmemory_vllm.evaluation.tasks import LATE_COUNT, TASK_NAMES, Sample, make_samples

# Of the longest prompt
LENGTH_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
# In shorter ones there is no fact of every kind.
LEAST_TOKENS = 600


def speaks_reference_language(encode: Callable[[str], list[int]]) -> bool:
    """Whether a tokenizer is the reference model's."""
    some = list(range(words.STOP, words.NUM_WORDS, 97))
    return encode(words.decode(some)) == [words.BOS, *some]


def reference_prompts(num_documents: int, num_tokens: int, seed: int, max_tokens: int) -> list[Prompt]:
    """Questions of every task and length in turn, each about a context of its own.

    Args:
        num_documents: prompts in all.
        num_tokens: tokens of the longest.
        seed: of contexts and questions.
        max_tokens: tokens to generate at most; no more than the right answer has, anyway.

    Raises:
        ConfigError: `num_tokens` is too short for a task.
    """
    if num_tokens < LEAST_TOKENS:
        raise ConfigError(f"--tokens is {num_tokens}: allowed is {LEAST_TOKENS} or more, so that every task fits")
    lengths = dict.fromkeys(max(LEAST_TOKENS, int(num_tokens * share)) for share in LENGTH_SHARES)
    cells = [(task, length) for length in lengths for task in TASK_NAMES]
    rounds = -(-num_documents // len(cells))
    samples = [make_samples(task, length, rounds, seed) for task, length in cells]
    ordered = [of_cell[index] for index in range(rounds) for of_cell in samples]
    return [_prompt(sample, group, max_tokens) for group, sample in enumerate(ordered[:num_documents])]


def accuracy_prompts(num_questions: int, num_tokens: int) -> list[Prompt]:
    """The questions of `flashmemory accuracy` with its defaults: what the oracle has to know for it.

    Args:
        num_questions: questions of each task.
        num_tokens: tokens of each prompt.
    """
    prompts: list[Prompt] = []
    for task in TASK_NAMES:
        shared = min(QUESTIONS_PER_CONTEXT, max_questions(task, num_tokens))
        samples = make_samples(task, num_tokens, num_questions, SEED, questions_per_context=shared)
        first = prompts[-1].group + 1 if prompts else 0
        prompts += [_prompt(sample, first + index // shared) for index, sample in enumerate(samples)]
    return prompts


def _prompt(sample: Sample, group: int, max_tokens: int | None = None) -> Prompt:
    first = LATE_COUNT if sample.task == "late" else 0
    num_tokens = min(len(sample.answer_ids), max_tokens or len(sample.answer_ids))
    last = len(sample.answer_ids) - 2  # without <end>
    return Prompt(tuple(sample.prompt_ids.tolist()), num_tokens, group, (first, last))
