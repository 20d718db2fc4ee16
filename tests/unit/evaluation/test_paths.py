"""A path is answered by its links alone, one after the other, and leads through the whole context."""

import numpy as np
import pytest

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation import vocabulary as words
from flashmemory_vllm.evaluation.paths import (
    ANSWER_LENS,
    HOPS,
    LEAD_LENS,
    make_path_samples,
    num_links,
    share_right,
)
from flashmemory_vllm.evaluation.tasks import LATE_COUNT, PathTaskName, Sample

TASKS: tuple[PathTaskName, ...] = ("path", "latepath")
NUM_TOKENS = 1500


def walk(sample: Sample) -> list[int]:
    """The answer to `TRACE a a` or `LATER a a` by following links, as dense attention would."""
    ids = sample.prompt_ids.tolist()
    key, answer = ids[-2:], []
    for _ in range(HOPS):
        place = next(i for i in range(len(ids)) if ids[i : i + 3] == [words.LET, *key])
        key = ids[place + 3 : place + 5]
        answer += key
    return answer


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("num_tokens", [800, 1501, 4096])
def test_links_lead_to_the_answer(task: PathTaskName, num_tokens: int) -> None:
    for sample in make_path_samples(task, num_tokens, 3, seed=1, questions_per_context=2):
        assert len(sample.prompt_ids) == num_tokens
        assert len(sample.answer_ids) == ANSWER_LENS[task]
        assert sample.answer_ids[LEAD_LENS[task] :].tolist() == walk(sample)


@pytest.mark.parametrize("task", TASKS)
def test_spans_are_the_links_of_the_path_in_turn(task: PathTaskName) -> None:
    for sample in make_path_samples(task, NUM_TOKENS, 3, seed=2):
        links = [sample.prompt_ids[start:stop].tolist() for start, stop in sample.needle_spans]
        assert [link[0] for link in links] == [words.LET] * HOPS
        assert links[0][1:3] == sample.prompt_ids[-2:].tolist()
        assert [word for link in links for word in link[3:5]] == sample.answer_ids[LEAD_LENS[task] :].tolist()
        starts = [start for start, _ in sample.needle_spans]
        assert starts != sorted(starts)


def test_the_late_one_counts_first() -> None:
    (sample,) = make_path_samples("latepath", NUM_TOKENS, 1, seed=2)
    counts = list(range(words.COUNT_0, words.COUNT_0 + LATE_COUNT))
    assert sample.answer_ids[: LEAD_LENS["latepath"]].tolist() == [*counts, *sample.prompt_ids[-2:].tolist()]


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_fixes_the_samples(task: PathTaskName) -> None:
    def tokens(seed: int) -> list[list[int]]:
        return [sample.prompt_ids.tolist() for sample in make_path_samples(task, NUM_TOKENS, 3, seed)]

    assert tokens(5) == tokens(5)
    assert tokens(5) != tokens(6)
    assert len({tuple(ids) for ids in tokens(5)}) == 3


def test_questions_share_one_context_and_start_at_different_links() -> None:
    samples = make_path_samples("path", NUM_TOKENS, 9, seed=3, questions_per_context=4)
    for first in (0, 4):
        group = samples[first : first + 4]
        assert len({sample.prompt_ids[: sample.num_shared_tokens].tobytes() for sample in group}) == 1
        assert len({tuple(sample.prompt_ids[-2:]) for sample in group}) == 4
    assert not np.array_equal(samples[0].prompt_ids[:-3], samples[4].prompt_ids[:-3])


def test_what_a_context_has_no_links_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"path needs {HOPS + 1} links, a prompt of 500 tokens has {num_links(500)}"):
        make_path_samples("path", 500, 1, seed=0)
    most = num_links(NUM_TOKENS)
    assert len(make_path_samples("path", NUM_TOKENS, most, seed=0, questions_per_context=most)) == most
    with pytest.raises(ConfigError, match=f"path needs {most + 1} links"):
        make_path_samples("path", NUM_TOKENS, most + 1, seed=0, questions_per_context=most + 1)


@pytest.mark.parametrize("task", TASKS)
def test_the_share_counts_the_walk_alone(task: PathTaskName) -> None:
    (sample,) = make_path_samples(task, NUM_TOKENS, 1, seed=4)
    right = sample.answer_ids.tolist()
    lead = LEAD_LENS[task]
    assert share_right(task, right, right) == 1.0
    assert share_right(task, right[:lead], right) == 0.0
    assert share_right(task, right[: lead + 12], right) == 12 / (2 * HOPS)
    assert share_right(task, [words.END] * lead + right[lead:], right) == 1.0
    # Right tokens in other places are not
    assert share_right(task, [*right[:lead], words.END, *right[lead:-1]], right) < 0.1
