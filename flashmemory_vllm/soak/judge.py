"""Compares finished texts with dense attention's, and counts right answers.

The reference is vLLM with its own backend and memory for all. It continues each prompt greedily, and where a text
differs from that, it reads the text: at each token from the first that differs on, how much likelier than that was
the likeliest? In exact arithmetic a right text has 0 there. Rounding depends on the batch that a token is computed in,
and it is largest where the model is unsure, which is where texts differ. So the reference reads its own text of the
same prompt as well, from the same token on: what it holds against itself is the control. A token counts as another
one's equal when it is less likely by at most twice the most of the control, or by the least tolerance of the dtype: for
fp32 far below what any wrong key or value makes of a logit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from flashmemory_vllm.soak.drive import Text
from flashmemory_vllm.soak.trace import SoakRequest, Trace

TOLERANCES: Mapping[str, float] = {"float32": 1e-3, "float16": 0.0625, "bfloat16": 0.5}


@dataclass(frozen=True, slots=True)
class Query:
    """What a reference is asked.

    Attributes:
        prompt: token ids.
        adapter: number of a LoRA adapter, 0 for none.
        max_tokens: tokens to generate, or as many of the prompt's last that are to be weighed.
    """

    prompt: tuple[int, ...]
    adapter: int
    max_tokens: int


class Reference(Protocol):
    """A dense engine."""

    def generate(self, queries: Sequence[Query]) -> list[list[int]]:
        """Continue each prompt greedily by exactly `max_tokens`."""

    def deficits(self, queries: Sequence[Query]) -> list[list[float]]:
        """For each of a prompt's last `max_tokens` tokens, by how much its log-probability is below the highest."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How texts compare with those of dense attention.

    Attributes:
        texts: compared.
        tokens: compared.
        identical: texts that are the same in every token.
        token_differences: tokens that dense attention would not have chosen, missing and surplus ones included.
        largest_deficit: the most that a token's log-probability is below the highest, of tokens that were weighed.
        control_deficit: the same of the reference's own texts of the same prompts.
        tolerance: what `largest_deficit` may be.
        wrong: the first differences, told.
    """

    texts: int
    tokens: int
    identical: int
    token_differences: int
    largest_deficit: float
    control_deficit: float
    tolerance: float
    wrong: Sequence[str]


def compare(trace: Trace, texts: Sequence[Text], reference: Reference, least_tolerance: float) -> Comparison:
    """Compare every text of a dense phase, token for token.

    Args:
        trace: the requests.
        texts: what they got.
        reference: dense attention.
        least_tolerance: of the dtype, see the module.
    """
    requests = {request.name: request for request in trace.requests}
    queries = [_query(trace, requests[text.name]) for text in texts]
    # Several requests may ask the same, and so do the answers of one
    lengths: dict[tuple[tuple[int, ...], int], int] = {}
    for query in queries:
        key = query.prompt, query.adapter
        lengths[key] = max(query.max_tokens, lengths.get(key, 0))
    unique = [Query(prompt, adapter, length) for (prompt, adapter), length in lengths.items()]
    right = dict(zip(lengths, reference.generate(unique), strict=True))
    differing: list[tuple[Text, Query]] = []
    control: list[Query] = []
    wrong: list[str] = []
    num_wrong = num_identical = 0
    for text, query in zip(texts, queries, strict=True):
        expected = tuple(right[query.prompt, query.adapter][: query.max_tokens])
        num_identical += text.token_ids == expected
        if len(text.token_ids) != query.max_tokens:
            num_wrong += abs(query.max_tokens - len(text.token_ids))
            wrong.append(f"{text.name}[{text.place}]: {len(text.token_ids)} tokens for {query.max_tokens}")
        both = min(len(text.token_ids), len(expected))
        got, expected = text.token_ids[:both], expected[:both]
        place = _first_difference(got, expected)
        if place is not None:
            differing.append((text, Query(query.prompt + got, query.adapter, both - place)))
            control.append(Query(query.prompt + expected, query.adapter, both - place))
    weighed = reference.deficits([query for _, query in differing])
    control_deficit = _largest(reference.deficits(control))
    tolerance = max(least_tolerance, 2 * control_deficit)
    for (text, query), deficits in zip(differing, weighed, strict=True):
        worse = [place for place, deficit in enumerate(deficits) if not deficit <= tolerance]
        num_wrong += len(worse)
        if worse:
            at = len(query.prompt) - len(trace.prompt(requests[text.name])) - query.max_tokens + worse[0]
            wrong.append(f"{text.name}[{text.place}]: token {at} is {deficits[worse[0]]:.4g} below the likeliest")
    return Comparison(
        texts=len(texts),
        tokens=sum(len(text.token_ids) for text in texts),
        identical=num_identical,
        token_differences=num_wrong,
        largest_deficit=_largest(weighed),
        control_deficit=control_deficit,
        tolerance=tolerance,
        wrong=wrong,
    )


def count_right(trace: Trace, texts: Sequence[Text]) -> int:
    """Texts of a sparse phase that are the right answer, from the first token to the last."""
    answers = {request.name: request.answer for request in trace.requests}
    return sum(text.token_ids == answers[text.name] for text in texts)


def _query(trace: Trace, request: SoakRequest) -> Query:
    return Query(tuple(trace.prompt(request)), request.adapter, request.max_tokens)


def _largest(weighed: Sequence[Sequence[float]]) -> float:
    return max((deficit for deficits in weighed for deficit in deficits), default=0.0)


def _first_difference(got: Sequence[int], expected: Sequence[int]) -> int | None:
    pairs = enumerate(zip(got, expected, strict=True))
    return next((place for place, (one, other) in pairs if one != other), None)
