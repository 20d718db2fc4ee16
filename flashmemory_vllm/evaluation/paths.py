"""Tasks whose answer walks through the whole context, a link at a time: what no small set of blocks can hold.

All facts of the context are links of one ring, `LET a a b b .`, in random places. From the key that is asked for the
answer goes from link to link, and which link is next is known only once the one before it has been read:

    path        TRACE a a     -> b b c c d d ...
    latepath    LATER a a     -> c0 c1 ... c143 a a b b c c d d ...

RULER's variable tracking (arXiv 2404.06654) with 16 hops. `latepath` counts first, so that there are selections
before the first link is needed. The ring has no end and neither has the answer: it is cut off after the last hop.
A model that was trained on one hop (`tracking`) can do this, because each hop is the same induction.
"""

from collections.abc import Iterator

import numpy as np

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation import vocabulary as words
from flashmemory_vllm.evaluation.contexts import KEY_WORDS, LET_LEN, Ids, scatter_starts, unique_keys
from flashmemory_vllm.evaluation.tasks import (
    DEFAULT_FACT_SHARE,
    LATE_COUNT,
    PathTaskName,
    Sample,
    num_wrapper_tokens,
    wrap,
)

HOPS = 16
QUESTION_LEN = 1 + KEY_WORDS
_WALK_LEN = HOPS * KEY_WORDS
# Generated before the first hop
LEAD_LENS: dict[PathTaskName, int] = {"path": 0, "latepath": LATE_COUNT + KEY_WORDS}
ANSWER_LENS: dict[PathTaskName, int] = {task: lead + _WALK_LEN for task, lead in LEAD_LENS.items()}
# Apart from the seeds of the tasks that the model was trained on
_SEEDS: dict[PathTaskName, int] = {"path": 100, "latepath": 101}


def num_links(num_tokens: int) -> int:
    """Links of the ring in a prompt of `num_tokens`; from each of them another question can start."""
    return int(_context_len(num_tokens) * DEFAULT_FACT_SHARE) // LET_LEN


def make_path_samples(
    task: PathTaskName, num_tokens: int, num_samples: int, seed: int, *, questions_per_context: int = 1
) -> list[Sample]:
    """Generate samples of one task; the same arguments give the same samples.

    Args:
        task: `path` or `latepath`.
        num_tokens: exact tokens of each prompt, wrapper and question included.
        num_samples: samples in all.
        seed: seed of the generator, independent for each task and length.
        questions_per_context: consecutive samples that start at different links of one ring. Default: 1

    Returns:
        `num_samples` samples, those of one context next to each other.

    Raises:
        ConfigError: the context has too few links, for one answer or for the questions.
    """
    links = num_links(num_tokens)
    needed = max(HOPS + 1, questions_per_context)
    if links < needed:
        raise ConfigError(f"{task} needs {needed} links, a prompt of {num_tokens} tokens has {links}")
    rng = np.random.default_rng([seed, _SEEDS[task], num_tokens])
    samples: list[Sample] = []
    while len(samples) < num_samples:
        samples += _ask_ring(rng, task, num_tokens, questions_per_context)
    return samples[:num_samples]


def share_right(task: PathTaskName, answer: list[int], right: list[int]) -> float:
    """Share of the tokens of a walk that are right at their places, what is generated before it left out."""
    lead = LEAD_LENS[task]
    return sum(given == wanted for given, wanted in zip(answer[lead:], right[lead:], strict=False)) / _WALK_LEN


def _context_len(num_tokens: int) -> int:
    return num_tokens - QUESTION_LEN - num_wrapper_tokens(chat=False)


def _ask_ring(rng: np.random.Generator, task: PathTaskName, num_tokens: int, num_questions: int) -> Iterator[Sample]:
    """Questions to one context. Links lie at random places, so starting at the first ones loses nothing."""
    links, context_len = num_links(num_tokens), _context_len(num_tokens)
    keys = unique_keys(rng, 1, links)[0]
    starts = scatter_starts(rng, 1, context_len, np.full(links, LET_LEN, np.int64))[0]
    context = _spell_ring(rng, context_len, keys, starts)
    asked = words.TRACE if task == "path" else words.LATER
    for first in range(num_questions):
        walk = np.arange(first, first + HOPS) % links
        parts = [keys[(walk + 1) % links].ravel()]
        if task == "latepath":
            parts = [np.arange(words.COUNT_0, words.COUNT_0 + LATE_COUNT), keys[first], *parts]
        question = np.array([[asked, *keys[first]]], np.int32)
        prompt = wrap(context[None], question, chat=False)[0]
        num_before = len(prompt) - context_len - QUESTION_LEN
        spans = tuple((num_before + int(start), num_before + int(start) + LET_LEN) for start in starts[walk])
        yield Sample(task, prompt, np.concatenate(parts).astype(np.int32), spans, num_before + context_len)


def _spell_ring(rng: np.random.Generator, num_tokens: int, keys: Ids, starts: np.ndarray) -> Ids:
    """The context `[num_tokens]`: noise, and at each start the link from a key to the next one."""
    tokens = (words.NOISE_0 + rng.integers(0, words.NUM_NOISE_WORDS, num_tokens)).astype(np.int32)
    ends = np.full((len(keys), 1), words.LET), np.full((len(keys), 1), words.STOP)
    tokens[starts[:, None] + np.arange(LET_LEN)] = np.hstack([ends[0], keys, np.roll(keys, -1, axis=0), ends[1]])
    return tokens
