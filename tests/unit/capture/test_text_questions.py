"""English needles: where the codes lie, how long prompts are, and what a question names."""

import re

import pytest

from flashmemory_vllm.capture.prompts import Encoder
from flashmemory_vllm.capture.text_questions import MARGIN_TOKENS, TextQuestions
from flashmemory_vllm.errors import ConfigError

DEPTHS = [0.0, 0.25, 1.0]


def encode(text: str) -> list[int]:
    """A token for each character, after one for the beginning."""
    return [0, *map(ord, text)]


def text_of(ids: object) -> str:
    assert isinstance(ids, list)
    return "".join(map(chr, ids[1:]))


QUESTIONS = TextQuestions(Encoder(encode, None))


def test_the_code_asked_for_lies_at_its_depth() -> None:
    needles = QUESTIONS.needles(20_000, DEPTHS, seed=1)
    for needle, depth in zip(needles, DEPTHS, strict=True):
        text = text_of(needle.prompt_ids)
        found = re.search(r"What is the secret code of the (\w+ \w+)\?", text)
        assert found is not None
        fact = f"The secret code of the {found[1]} is {needle.answer}."
        assert text.count(fact) == 1
        assert text.index(fact) / len(text) == pytest.approx(depth, abs=0.02)
        assert needle.is_right(f"The secret code is\n{needle.answer}.")
    assert len({needle.answer for needle in needles}) == len(DEPTHS)


def test_prompts_have_the_tokens_asked_for_and_a_line_more() -> None:
    """With fewer a server could take them for short requests, which stay dense."""
    prompts = [needle.prompt_ids for needle in QUESTIONS.needles(9000, DEPTHS, seed=1)]
    prompts += QUESTIONS.continuations(9000, 5, seed=1)
    for prompt in prompts:
        assert 9000 <= len(prompt) <= 9000 + MARGIN_TOKENS + 150


def test_the_same_seed_makes_the_same_questions() -> None:
    assert QUESTIONS.needles(9000, DEPTHS, 1) == QUESTIONS.needles(9000, DEPTHS, 1)
    assert QUESTIONS.needles(9000, DEPTHS, 1) != QUESTIONS.needles(9000, DEPTHS, 2)


def test_a_chat_model_is_asked_in_a_chat() -> None:
    encoder = Encoder(encode, lambda messages: encode(f"<{messages[0]['role']}>{messages[0]['content']}<assistant>"))
    (needle,) = TextQuestions(encoder).needles(3000, [0.5], seed=0)
    assert text_of(needle.prompt_ids).startswith("<user>")
    assert text_of(needle.prompt_ids).endswith("<assistant>")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="--lengths has 100: the facts of 3 --depths take"):
        QUESTIONS.needles(100, DEPTHS, seed=0)
    with pytest.raises(ConfigError, match="--depths is 500"):
        QUESTIONS.needles(100_000, [index / 499 for index in range(500)], seed=0)
