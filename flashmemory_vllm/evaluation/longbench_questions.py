"""LongBench v2 without a server: its file format, its zero-shot prompt, and how an answer is read and counted.

Bai et al., "LongBench v2: Towards Deeper Understanding and Reasoning on Realistic Long-context Multitasks", 2024
(https://arxiv.org/abs/2412.15204). Prompt, cut and reading of the answer are those of its published evaluation.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flashmemory_vllm.errors import ConfigError

Choice = Literal["A", "B", "C", "D"]

# The form with parentheses goes first: an answer may repeat both
_ANSWER_FORMS = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))
# Shares of the questions that get an accuracy of their own: name, field, value.
SPLITS = (
    ("easy", "difficulty", "easy"),
    ("hard", "difficulty", "hard"),
    ("short", "length", "short"),
    ("medium", "length", "medium"),
    ("long", "length", "long"),
)


class Question(BaseModel):
    """One question of the file; fields that are not named here are ignored.

    Attributes:
        id: tells questions apart; `_id` in the file.
        domain: kind of text.
        sub_domain: finer kind.
        difficulty: as people and models found it.
        length: class of the length of the text.
        question: what is asked.
        choice_A: the first answer to choose from, as are the other three.
        choice_B: the second.
        choice_C: the third.
        choice_D: the fourth.
        answer: the right one.
        context: the text.
    """

    model_config = ConfigDict(frozen=True)

    id: str = Field(alias="_id")
    domain: str
    sub_domain: str
    difficulty: Literal["easy", "hard"]
    length: Literal["short", "medium", "long"]
    question: str
    choice_A: str  # noqa: N815 - the file's own names
    choice_B: str  # noqa: N815
    choice_C: str  # noqa: N815
    choice_D: str  # noqa: N815
    answer: Choice
    context: str

    @property
    def prompt(self) -> str:
        """What a model is asked, without examples and without a demand to reason first."""
        return (
            "Please read the following text and answer the question below.\n\n"
            f"<text>\n{self.context.strip()}\n</text>\n\n"
            f"What is the correct answer to this question: {self.question.strip()}\n"
            "Choices:\n"
            f"(A) {self.choice_A.strip()}\n"
            f"(B) {self.choice_B.strip()}\n"
            f"(C) {self.choice_C.strip()}\n"
            f"(D) {self.choice_D.strip()}\n\n"
            'Format your response as follows: "The correct answer is (insert answer here)".'
        )


class Tokenizer(Protocol):
    """What cutting a prompt takes of a tokenizer of `transformers`."""

    def encode(self, text: str) -> list[int]:
        """Token ids, special ones included."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Text of token ids."""


def load_questions(path: Path) -> list[Question]:
    """Read the questions of a JSON list or of a file with one JSON object a line.

    Raises:
        ConfigError: the file cannot be read, a question lacks a field or has another value than allowed, or an id
            comes twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        items = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in _lines(text)]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} ({error}): allowed is a JSON list or one JSON object a line") from error
    questions: dict[str, Question] = {}
    for index, item in enumerate(items):
        try:
            question = Question.model_validate(item)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "the question"
            raise ConfigError(f"question {index} of {path}, {field}: {first['msg']}") from error
        if question.id in questions:
            raise ConfigError(f"question {index} of {path} has the _id {question.id!r} of an earlier one")
        questions[question.id] = question
    if not questions:
        raise ConfigError(f"{path} has no questions")
    return list(questions.values())


def _lines(text: str) -> list[str]:
    # `str.splitlines` would also cut at separators that JSON allows inside strings
    return [line for line in text.split("\n") if line.strip()]


def cut_middle(prompt: str, tokenizer: Tokenizer, max_tokens: int) -> tuple[str, bool]:
    """Keep the first and the last half of `max_tokens` tokens.

    Args:
        prompt: any text.
        tokenizer: of the model.
        max_tokens: most tokens to keep.

    Returns:
        The text, and whether it was cut. What fits is returned as it is.
    """
    ids = tokenizer.encode(prompt)
    if len(ids) <= max_tokens:
        return prompt, False
    half = max_tokens // 2
    return tokenizer.decode(ids[:half] + ids[half - max_tokens :], skip_special_tokens=True), True


def read_choice(answer: str) -> Choice | None:
    """The choice that an answer names in the form the prompt asks for, or None; asterisks are ignored."""
    plain = answer.replace("*", "")
    for form in _ANSWER_FORMS:
        if match := form.search(plain):
            choice: Choice = match.group(1)  # type: ignore[assignment]
            return choice
    return None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered.

    Attributes:
        id: of the question.
        choice: what was read from the text, None if it has not the form.
        text: the whole answer.
        truncated: whether the prompt was cut.
    """

    id: str
    choice: Choice | None
    text: str
    truncated: bool


@dataclass(frozen=True, slots=True)
class Score:
    """Answers to one share of the questions, counted.

    Attributes:
        name: of the share; empty for all questions.
        questions: how many.
        accuracy: right answers over questions; one that cannot be read is wrong.
        unparsable: answers that cannot be read.
        truncated: prompts that were cut.
    """

    name: str
    questions: int
    accuracy: float
    unparsable: int
    truncated: int


def score_answers(questions: Sequence[Question], answers: Sequence[Answer]) -> list[Score]:
    """Count all questions and each share that has any.

    Args:
        questions: what was asked.
        answers: one for each question, in any order.
    """
    by_id = {answer.id: answer for answer in answers}
    pairs = [(question, by_id[question.id]) for question in questions]
    shares = [(name, [pair for pair in pairs if getattr(pair[0], field) == value]) for name, field, value in SPLITS]
    return [_count(name, share) for name, share in [("", pairs), *shares] if share]


def _count(name: str, pairs: Sequence[tuple[Question, Answer]]) -> Score:
    return Score(
        name=name,
        questions=len(pairs),
        accuracy=sum(answer.choice == question.answer for question, answer in pairs) / len(pairs),
        unparsable=sum(answer.choice is None for _, answer in pairs),
        truncated=sum(answer.truncated for _, answer in pairs),
    )
