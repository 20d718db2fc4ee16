"""The tasks are exact in length, the same under a seed, and answered by the needles they point at."""

import numpy as np
import pytest

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation import vocabulary as words
from flashmemory_vllm.evaluation.contexts import ContextShape, build_contexts
from flashmemory_vllm.evaluation.tasks import (
    ANSWER_LENS,
    LATE_COUNT,
    QUESTION_LENS,
    TASK_NAMES,
    Sample,
    TaskName,
    ask,
    make_samples,
)

NUM_TOKENS = 1500


def _spans(sample: Sample) -> list[list[int]]:
    return [sample.prompt_ids[start:stop].tolist() for start, stop in sample.needle_spans]


def _question(sample: Sample, *, chat: bool = False) -> list[int]:
    stop = len(sample.prompt_ids) - (1 if chat else 0)
    question: list[int] = sample.prompt_ids[sample.num_shared_tokens : stop].tolist()
    return question


@pytest.mark.parametrize("task", TASK_NAMES)
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("num_tokens", [700, 1501, 4096])
def test_prompts_have_the_exact_length(task: TaskName, chat: bool, num_tokens: int) -> None:
    for sample in make_samples(task, num_tokens, 3, seed=1, chat=chat):
        assert len(sample.prompt_ids) == num_tokens
        assert len(sample.answer_ids) == ANSWER_LENS[task]
        assert sample.prompt_ids[0] == words.BOS
        assert (sample.prompt_ids[1] == words.USER) == (sample.prompt_ids[-1] == words.ASSISTANT) == chat
        assert sample.answer_ids[-1] == words.END


@pytest.mark.parametrize("task", TASK_NAMES)
def test_a_seed_fixes_the_samples(task: TaskName) -> None:
    def tokens(seed: int) -> list[list[int]]:
        return [sample.prompt_ids.tolist() for sample in make_samples(task, NUM_TOKENS, 3, seed)]

    assert tokens(5) == tokens(5)
    assert tokens(5) != tokens(6)


@pytest.mark.parametrize("chat", [False, True])
def test_multikey_answer_follows_the_asked_key(chat: bool) -> None:
    for sample in make_samples("multikey", NUM_TOKENS, 5, seed=2, chat=chat):
        [needle] = _spans(sample)
        asked = _question(sample, chat=chat)
        assert asked[0] == words.ASK
        assert needle == [words.NEEDLE, *asked[1:], *sample.answer_ids[:-1], words.STOP]


def test_multivalue_answer_spells_all_values_in_order() -> None:
    for sample in make_samples("multivalue", NUM_TOKENS, 5, seed=2):
        needles = _spans(sample)
        key = _question(sample)[1:]
        assert [needle[1:3] for needle in needles] == [key] * 3
        spelled = [word for needle in needles for word in needle[1:-1]]
        assert [*spelled, words.END] == sample.answer_ids.tolist()
        assert [needle[3] - words.VALUE_ORDINAL_0 for needle in needles] == [0, 1, 2]


def test_multiquery_answers_every_asked_key() -> None:
    for sample in make_samples("multiquery", NUM_TOKENS, 5, seed=2):
        asked = _question(sample)[1:]
        pairs = [asked[i : i + 3] for i in range(0, 9, 3)]
        told = [[*pair, *needle[3:6]] for pair, needle in zip(pairs, _spans(sample), strict=True)]
        assert [pair[1:] for pair in pairs] == [needle[1:3] for needle in _spans(sample)]
        assert [*(word for triple in told for word in triple), words.END] == sample.answer_ids.tolist()


def test_tracking_takes_two_hops() -> None:
    for sample in make_samples("tracking", NUM_TOKENS, 5, seed=2):
        let, needle = _spans(sample)
        assert let == [words.LET, *_question(sample)[1:], *needle[1:3], words.STOP]
        assert sample.answer_ids.tolist() == [*needle[1:6], words.END]


def test_late_generates_long_before_it_answers() -> None:
    assert LATE_COUNT >= 128
    for sample in make_samples("late", NUM_TOKENS, 5, seed=2):
        [needle] = _spans(sample)
        assert sample.answer_ids[:LATE_COUNT].tolist() == list(range(words.COUNT_0, words.COUNT_0 + LATE_COUNT))
        assert sample.answer_ids[LATE_COUNT:].tolist() == [*needle[1:6], words.END]
        assert _question(sample)[1:] == needle[1:3]


def test_no_key_is_spelled_twice_as_a_fact() -> None:
    shape = ContextShape.filling(8000, 0.4)
    context = build_contexts(np.random.default_rng(0), 2, 8000, shape)
    for keys in context.keys:
        assert len({tuple(pair) for pair in keys.tolist()}) == len(keys)
    for row in context.tokens.tolist():
        plain = [tuple(row[i + 1 : i + 3]) for i, word in enumerate(row) if word == words.NEEDLE]
        lone = [key for i, key in enumerate(plain) if plain.count(key) == 1]
        assert len(lone) == shape.num_needles + shape.num_chains
        assert len(plain) - len(lone) == 3 * shape.num_groups
        assert row.count(words.LET) == shape.num_chains


def test_a_16k_context_has_hundreds_of_needles() -> None:
    [sample] = make_samples("multikey", 16384, 1, seed=0)
    assert sample.prompt_ids.tolist().count(words.NEEDLE) > 300


@pytest.mark.parametrize("task", TASK_NAMES)
def test_questions_share_one_context(task: TaskName) -> None:
    samples = make_samples(task, 4096, 9, seed=3, questions_per_context=4)
    assert len(samples) == 9
    for first in (0, 4):
        group = samples[first : first + 4]
        shared = {sample.prompt_ids[: sample.num_shared_tokens].tobytes() for sample in group}
        assert len(shared) == 1
        assert len({tuple(_question(sample)) for sample in group}) == 4
    assert samples[0].prompt_ids[:4000].tolist() != samples[4].prompt_ids[:4000].tolist()
    for sample in samples:
        assert sample.answer_ids[-4:-1].tolist() == _spans(sample)[-1][-4:-1]


def test_needles_lie_at_every_depth() -> None:
    samples = make_samples("multikey", 2048, 200, seed=4)
    depths = np.array([sample.needle_spans[0][0] / 2048 for sample in samples])
    counts, _ = np.histogram(depths, bins=4, range=(0, 1))
    assert counts.min() > 25


def test_too_few_facts_are_refused() -> None:
    with pytest.raises(ConfigError, match="multivalue"):
        make_samples("multivalue", 200, 1, seed=0)
    with pytest.raises(ConfigError, match="too short"):
        build_contexts(np.random.default_rng(0), 1, 10, ContextShape(2, 0, 0))


def test_ask_declares_its_lengths() -> None:
    context = build_contexts(np.random.default_rng(0), 2, 2000, ContextShape.filling(2000, 0.4))
    for task in TASK_NAMES:
        asked = ask(task, context, 0)
        assert asked.question.shape == (2, QUESTION_LENS[task])
        assert asked.answer.shape == (2, ANSWER_LENS[task])


def test_vocabulary_is_2048_distinct_words() -> None:
    assert len(set(words.WORDS)) == len(words.WORDS) == words.NUM_WORDS
    assert all(not any(letter.isspace() for letter in word) for word in words.WORDS)
    assert words.encode(words.decode(list(range(words.NUM_WORDS)))) == list(range(words.NUM_WORDS))
