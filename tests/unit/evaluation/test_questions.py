"""Every task can be asked through one door, and the trained ones are asked what they always were."""

import numpy as np
import pytest

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation import vocabulary as words
from flashmemory_vllm.evaluation.questions import ALL_TASK_NAMES, answer_len, make_questions, max_questions, score
from flashmemory_vllm.evaluation.tasks import TASK_NAMES, AnyTaskName, TaskName, make_samples


@pytest.mark.parametrize("task", ALL_TASK_NAMES)
@pytest.mark.parametrize("tokens", [800, 4096])
def test_a_context_holds_as_many_questions_as_promised(task: AnyTaskName, tokens: int) -> None:
    most = max_questions(task, tokens)
    samples = make_questions(task, tokens, most, 0, questions_per_context=most)
    assert {len(sample.answer_ids) for sample in samples} == {answer_len(task)}
    with pytest.raises(ConfigError):
        make_questions(task, tokens, most + 1, 0, questions_per_context=most + 1)


@pytest.mark.parametrize("task", TASK_NAMES)
def test_trained_tasks_ask_what_they_always_did(task: TaskName) -> None:
    ours = make_questions(task, 1500, 3, 7, questions_per_context=2)
    theirs = make_samples(task, 1500, 3, 7, questions_per_context=2)
    assert all(np.array_equal(a.prompt_ids, b.prompt_ids) for a, b in zip(ours, theirs, strict=True))


def test_paths_are_not_among_the_trained_tasks() -> None:
    assert TASK_NAMES == ("multikey", "multivalue", "multiquery", "tracking", "late")
    assert set(ALL_TASK_NAMES) - set(TASK_NAMES) == {"path", "latepath"}


def test_a_right_answer_scores_one_and_only_paths_score_parts() -> None:
    for task in ALL_TASK_NAMES:
        (sample,) = make_questions(task, 1500, 1, 0, questions_per_context=1)
        right = sample.answer_ids.tolist()
        assert score(sample, right) == 1.0
        spoilt = [*right[:-1], words.STOP]
        assert score(sample, spoilt) == (31 / 32 if "path" in task else 0.0)
        assert score(sample, []) == 0.0
