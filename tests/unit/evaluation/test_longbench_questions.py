"""Format, prompt, cut, reading and counting of LongBench v2."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.longbench_questions import (
    Answer,
    Question,
    cut_middle,
    load_questions,
    read_choice,
    score_answers,
)

ITEM = {
    "_id": "q0",
    "domain": "Single-Document QA",
    "sub_domain": "Legal",
    "difficulty": "easy",
    "length": "short",
    "question": " Who signed? ",
    "choice_A": "Ada",
    "choice_B": "Boris ",
    "choice_C": "Clara",
    "choice_D": "David",
    "answer": "B",
    "context": "\nBoris signed $Q$.\n",
}
PROMPT = """Please read the following text and answer the question below.

<text>
Boris signed $Q$.
</text>

What is the correct answer to this question: Who signed?
Choices:
(A) Ada
(B) Boris
(C) Clara
(D) David

Format your response as follows: "The correct answer is (insert answer here)"."""


class Letters:
    """A token for every letter; 0 is a special token."""

    def encode(self, text: str) -> list[int]:
        return [0, *map(ord, text)]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(map(chr, token_ids[skip_special_tokens and token_ids[0] == 0 :]))


def make_question(**fields: str) -> Question:
    return Question.model_validate(ITEM | fields)


def test_the_prompt_is_the_published_one() -> None:
    assert make_question().prompt == PROMPT


@pytest.mark.parametrize("dump", [json.dumps, lambda items: "\n".join(map(json.dumps, items)) + "\n\n"])
def test_both_file_formats_hold_the_same_questions(dump: object, tmp_path: Path) -> None:
    assert callable(dump)
    path = tmp_path / "questions"
    path.write_text(dump([ITEM, ITEM | {"_id": "q1", "retrieved_context": []}]), encoding="utf-8")
    assert load_questions(path) == [make_question(), make_question(_id="q1")]


def test_a_line_may_hold_an_unusual_separator(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(ITEM | {"context": "a\u2028b"}, ensure_ascii=False), encoding="utf-8")
    assert load_questions(path)[0].context == "a\u2028b"


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([], "has no questions"),
        (
            [ITEM, {**ITEM, "_id": "q1", "answer": "E"}],
            "question 1 of .*, answer: Input should be 'A', 'B', 'C' or 'D'",
        ),
        ([{name: ITEM[name] for name in ITEM if name != "choice_C"}], "question 0 of .*, choice_C: Field required"),
        ([ITEM, ITEM], "question 1 of .* has the _id 'q0' of an earlier one"),
        (["text"], "question 0 of .*, the question"),
    ],
)
def test_another_file_is_refused(items: list[object], said: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(items), encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        load_questions(path)


@pytest.mark.parametrize("text", ["[1", "no json"])
def test_no_json_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="allowed is a JSON list or one JSON object a line"):
        load_questions(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json"):
        load_questions(tmp_path / "absent.json")


@given(text=st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"])), max_tokens=st.integers(2, 20))
def test_a_cut_keeps_both_ends(text: str, max_tokens: int) -> None:
    cut, was_cut = cut_middle(text, Letters(), max_tokens)
    assert was_cut == (len(text) + 1 > max_tokens)
    if not was_cut:
        assert cut == text
        return
    # The special token takes one place of the first half
    head, tail = max_tokens // 2 - 1, max_tokens - max_tokens // 2
    assert cut == text[:head] + text[-tail:]


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("The correct answer is (C).", "C"),
        ("**The correct answer is (B)**", "B"),
        ("The correct answer is D", "D"),
        ("The correct answer is B, so: The correct answer is (A)", "A"),
        ("The correct answer is (E)", None),
        ("the correct answer is (A)", None),
        ("(A)", None),
        ("", None),
    ],
)
def test_a_choice_is_read_only_from_the_asked_form(answer: str, choice: str | None) -> None:
    assert read_choice(answer) == choice


def test_each_share_is_counted() -> None:
    questions = [
        make_question(_id="a", difficulty="easy", length="short", answer="A"),
        make_question(_id="b", difficulty="hard", length="medium", answer="B"),
        make_question(_id="c", difficulty="hard", length="medium", answer="C"),
        make_question(_id="d", difficulty="hard", length="short", answer="D"),
    ]
    answers = [
        Answer("d", None, "?", truncated=True),
        Answer("c", "C", "", truncated=True),
        Answer("b", "A", "", truncated=False),
        Answer("a", "A", "", truncated=False),
    ]
    counted = [
        (score.name, score.questions, score.accuracy, score.unparsable, score.truncated)
        for score in score_answers(questions, answers)
    ]
    assert counted == [
        ("", 4, 0.5, 1, 2),
        ("easy", 1, 1.0, 0, 0),
        ("hard", 3, pytest.approx(1 / 3), 1, 2),
        ("short", 2, 0.5, 1, 1),
        ("medium", 2, 0.5, 0, 1),
    ]
