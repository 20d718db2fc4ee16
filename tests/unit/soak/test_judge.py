"""A text is right if dense attention would have written each of its tokens, up to rounding."""

from collections.abc import Sequence

import pytest

from flashmemory_vllm.soak.drive import Driver, Text
from flashmemory_vllm.soak.judge import Comparison, Query, compare, count_right, weigh
from flashmemory_vllm.soak.trace import Trace
from tests.unit.soak.fake_engine import FakeEngine, right_token
from tests.unit.soak.traces import trace


class FakeReference:
    """Knows what `FakeEngine` says; a token next to the right one is nearly as likely, any other is not."""

    def __init__(self) -> None:
        self.generated: list[Query] = []

    def generate(self, queries: Sequence[Query]) -> list[list[int]]:
        """What the engine says."""
        self.generated += queries
        return [[right_token(one.prompt, place) for place in range(one.max_tokens)] for one in queries]

    def deficits(self, queries: Sequence[Query]) -> list[list[float]]:
        """0.1 for a neighbour, 3 for a stranger; what goes before is taken as it is, as a model does."""
        return [[self._deficit(one, place) for place in range(-one.max_tokens, 0)] for one in queries]

    def _deficit(self, query: Query, place: int) -> float:
        return {0: 0.0, 1: 0.1}.get(query.prompt[place] % 2, 3.0) if query.prompt[place] < 2000 else 3.0


@pytest.fixture(scope="module")
def played() -> tuple[Trace, list[Text]]:
    texts: list[Text] = []
    drawn = trace()
    Driver(drawn, FakeEngine(), texts.append).run()
    return drawn, texts


def _changed(text: Text, place: int, token: int) -> Text:
    tokens = list(text.token_ids)
    tokens[place] = token
    return Text(text.name, text.place, tuple(tokens))


def _judged(trace: Trace, texts: Sequence[Text], reference: FakeReference, tolerance: float) -> Comparison:
    return weigh(compare(trace, texts, reference), reference, tolerance)


def test_right_texts_are_identical_and_each_prompt_is_asked_once(played: tuple[Trace, list[Text]]) -> None:
    drawn, texts = played
    reference = FakeReference()
    found = _judged(drawn, texts, reference, 0.01)
    assert (found.token_differences, found.identical, found.texts) == (0, len(texts), len(texts))
    assert found.tokens == sum(len(text.token_ids) for text in texts)
    asked = [(query.prompt, query.adapter) for query in reference.generated]
    assert len(asked) == len(set(asked)) < len(texts)


def test_one_wrong_token_of_all_counts_and_is_told(played: tuple[Trace, list[Text]]) -> None:
    drawn, texts = played
    last = len(texts[7].token_ids) - 1
    wrong = [*texts[:7], _changed(texts[7], last, 5000), *texts[8:]]
    found = _judged(drawn, wrong, FakeReference(), 0.01)
    assert (found.token_differences, found.identical, found.largest_deficit) == (1, len(texts) - 1, 3.0)
    assert found.wrong == [f"{texts[7].name}[{texts[7].place}]: token {last} is 3 below the likeliest"]


@pytest.mark.parametrize("change", [-1, 1], ids=["a lost token", "a surplus one"])
def test_a_text_of_another_length_is_told_and_not_identical(played: tuple[Trace, list[Text]], change: int) -> None:
    drawn, texts = played
    # Nobody asked the same for longer, so that the reference has no token there
    text = max(texts, key=lambda one: len(one.token_ids))
    num_asked = len(text.token_ids)
    tokens = (*text.token_ids, 7)[: num_asked + change]
    wrong = [Text(one.name, one.place, tokens) if one is text else one for one in texts]
    found = _judged(drawn, wrong, FakeReference(), 0.01)
    assert (found.token_differences, found.identical) == (1, len(texts) - 1)
    assert found.wrong == [f"{text.name}[{text.place}]: {num_asked + change} tokens for {num_asked}"]


def test_a_token_that_rounding_may_choose_is_no_difference_but_the_text_is_not_identical(
    played: tuple[Trace, list[Text]],
) -> None:
    drawn, texts = played
    last = len(texts[7].token_ids) - 1
    odd = texts[7].token_ids[last] // 2 * 2 + 1
    wrong = [*texts[:7], _changed(texts[7], last, odd + 2), *texts[8:]]
    assert _judged(drawn, wrong, FakeReference(), 0.25).token_differences == 0
    assert _judged(drawn, wrong, FakeReference(), 0.25).tolerance == 0.25
    found = _judged(drawn, wrong, FakeReference(), 0.01)
    assert (found.token_differences, found.identical, found.largest_deficit) == (1, len(texts) - 1, 0.1)


def test_what_the_reference_holds_against_itself_is_no_difference(played: tuple[Trace, list[Text]]) -> None:
    """Twice as much is allowed as it finds in its own text of the same prompt, from the same token on."""

    class Unsure(FakeReference):
        own = 0.06

        def deficits(self, queries: Sequence[Query]) -> list[list[float]]:
            return [[self.own if found == 0 else found for found in one] for one in super().deficits(queries)]

    drawn, texts = played
    last = len(texts[7].token_ids) - 1
    odd = texts[7].token_ids[last] // 2 * 2 + 1
    wrong = [*texts[:7], _changed(texts[7], last, odd + 2), *texts[8:]]
    found = _judged(drawn, wrong, Unsure(), 0.01)
    assert (found.control_deficit, found.tolerance, found.largest_deficit) == (0.06, 0.12, 0.1)
    assert (found.token_differences, found.wrong) == (0, [])
    stranger = [*texts[:7], _changed(texts[7], last, 5000), *texts[8:]]
    assert _judged(drawn, stranger, Unsure(), 0.01).token_differences == 1


def test_a_deficit_that_is_not_a_number_is_a_difference(played: tuple[Trace, list[Text]]) -> None:
    class Broken(FakeReference):
        def deficits(self, queries: Sequence[Query]) -> list[list[float]]:
            return [[float("nan")] * one.max_tokens for one in queries]

    drawn, texts = played
    wrong = [_changed(texts[0], len(texts[0].token_ids) - 1, 5000), *texts[1:]]
    assert _judged(drawn, wrong, Broken(), 0.5).token_differences == 1


def test_lost_tokens_count(played: tuple[Trace, list[Text]]) -> None:
    drawn, texts = played
    short = Text(texts[0].name, texts[0].place, texts[0].token_ids[:-2])
    assert _judged(drawn, [short, *texts[1:]], FakeReference(), 0.01).token_differences == 2


def test_answers_are_right_from_the_first_token_to_the_last() -> None:
    drawn = trace(phase="sparse")
    first, second = drawn.requests[:2]
    texts = [Text(first.name, 0, first.answer), Text(first.name, 1, first.answer[:-1]), Text(second.name, 0, (1,))]
    assert count_right(drawn, texts) == 1
