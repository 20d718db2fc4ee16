"""Needles: where the fact lies, what counts as right, and figures by depth."""

from typing import Any

import numpy as np
import pytest

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.needles import Needle, NeedlePart, ReferenceQuestions
from flashmemory_vllm.evaluation.target import Target
from flashmemory_vllm.evaluation.vocabulary import NEEDLE, encode
from tests.unit.evaluation.eval_fakes import FakeEngine
from tests.unit.evaluation.fake_server import MODEL

DEPTHS = [0.0, 0.5, 1.0]


def place_of_fact(needle: Needle) -> float:
    """Share of the prompt before the fact that holds the answer, found by the key that the question names."""
    ids = np.asarray(needle.prompt_ids)
    fact = [NEEDLE, *ids[-2:], *encode(needle.answer)]
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(fact))
    (place,) = np.flatnonzero((windows == fact).all(axis=1))
    return float(place / len(ids))


def test_facts_lie_at_the_depths_asked_for() -> None:
    needles = ReferenceQuestions().needles(4096, DEPTHS, seed=3)
    for needle, depth in zip(needles, DEPTHS, strict=True):
        assert len(needle.prompt_ids) == 4096
        assert place_of_fact(needle) == pytest.approx(depth, abs=0.03)
    # All but the question is the same, so a prefix cache pays for it once
    assert len({tuple(needle.prompt_ids[:-3]) for needle in needles}) == 1


def test_another_seed_is_another_context_and_the_same_seed_the_same() -> None:
    first, again, other = (ReferenceQuestions().needles(1024, DEPTHS, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_a_context_too_short_for_the_depths_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs fact"):
        ReferenceQuestions().needles(128, [index / 50 for index in range(51)], seed=0)


def test_continuations_are_of_several_tasks() -> None:
    prompts = ReferenceQuestions().continuations(1024, 6, seed=0)
    assert {len(prompt) for prompt in prompts} == {1024}
    assert len({tuple(prompt) for prompt in prompts}) == 6


@pytest.mark.parametrize(
    ("text", "right"),
    [("1 2 3", True), (" The code\nis 1  2\n3.", True), ("1 2", False), ("3 2 1", False)],
)
def test_the_answer_must_be_held_whatever_is_around_it(text: str, right: bool) -> None:
    assert Needle([], "1 2 3", 8).is_right(text) is right


def test_figures_by_depth() -> None:
    """The server knows all answers but those to the needles in the middle."""
    part = NeedlePart(1024, DEPTHS, 3, 0, ReferenceQuestions(), 2)
    asked = [needle for seed in range(3) for needle in ReferenceQuestions().needles(1024, DEPTHS, seed)]
    missed = [tuple(needle.prompt_ids) for needle in asked[1::3]]
    answers = {tuple(needle.prompt_ids): needle.answer for needle in asked}

    class Server(FakeEngine):
        def complete(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
            answer = super().complete(path, body)
            prompt = tuple(body["prompt"])
            answer["choices"][0]["text"] = "no" if prompt in missed else answers[prompt]
            return answer

    with Server(lambda _: []) as server:
        figures = part.measure(Target.connect("dense", server.url, MODEL))
    assert [(one.depth, one.score, one.questions) for one in figures] == [(0.0, 1.0, 3), (0.5, 0.0, 3), (1.0, 1.0, 3)]
    assert figures[1].right == [False] * 3
    assert figures[1].wrong == [{"expected": needle.answer, "answer": "no"} for needle in asked[1::3]]
    assert figures[0].wrong == []


def test_a_length_must_fit_the_server() -> None:
    with FakeEngine(lambda _: [], max_model_len=1024) as server:
        target = Target.connect("dense", server.url, MODEL)
        with pytest.raises(ConfigError, match="--lengths: prompt and answer take 1,028 tokens"):
            NeedlePart(1024, DEPTHS, 1, 0, ReferenceQuestions(), 1).measure(target)
