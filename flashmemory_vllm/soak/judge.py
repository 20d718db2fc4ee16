"""Compares finished texts with dense attention's, and counts right answers.

The reference is vLLM with its own backend and memory for all. It continues each prompt greedily, and where a text
differs from that, a reader says of each token, from the first that differs on, how much less likely it is than the
likeliest. In exact arithmetic a right text has 0 there. Rounding depends on the batch that a token is computed in, and
it decides where two tokens are nearly as likely, which is where texts differ. The reader computes in float32 whatever
the phase does: what it finds is the rounding of who wrote the text, without its own beside that. It reads the
reference's text of the same prompt as well, from the same token on: what it holds against that is the control. A token
counts as another one's equal when it is less likely by at most twice the most of the control, or by the least tolerance
of the phase's dtype.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from flashmemory_vllm.soak.drive import Text
from flashmemory_vllm.soak.trace import SoakRequest, Trace

# A writer chooses by logits in its own dtype. The largest of a model that is sure lie between 16 and 32, where float16
# steps by 2^-6 and bfloat16 by 2^-3. Four steps: each of the two logits that it compared may be wrong by two, of which
# one half is its own rounding, and the rest that of all layers below. In float32 they step by 2^-19; there it is what
# sums in another order make of a logit, with room, and far below what any wrong key or value does.
TOLERANCES: Mapping[str, float] = {"float32": 1e-3, "float16": 4 * 2**-6, "bfloat16": 4 * 2**-3}


@dataclass(frozen=True, slots=True)
class Query:
    """What a reference or a reader is asked.

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


class Reader(Protocol):
    """The same model in float32."""

    def deficits(self, queries: Sequence[Query]) -> list[list[float]]:
        """For each of a prompt's last `max_tokens` tokens, by how much its log-probability is below the highest."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A text that the reference has not written.

    Attributes:
        text: what was served.
        place: of its first token that differs.
        served: the tokens from there on, after all that goes before them.
        expected: the same of the reference's text.
    """

    text: Text
    place: int
    served: Query
    expected: Query


@dataclass(frozen=True, slots=True)
class Found:
    """How texts compare with the reference's, before any is read.

    Attributes:
        texts: compared.
        tokens: compared.
        identical: texts that are the same in every token.
        miscounted: tokens that are missing or surplus.
        wrong: texts that have such, told.
        differing: texts that are to be read.
    """

    texts: int
    tokens: int
    identical: int
    miscounted: int
    wrong: Sequence[str]
    differing: Sequence[Difference]


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


def compare(trace: Trace, texts: Sequence[Text], reference: Reference) -> Found:
    """Compare every text of a dense phase, token for token.

    Args:
        trace: the requests.
        texts: what they got.
        reference: dense attention.
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
    differing: list[Difference] = []
    wrong: list[str] = []
    num_identical = num_miscounted = 0
    for text, query in zip(texts, queries, strict=True):
        expected = tuple(right[query.prompt, query.adapter][: query.max_tokens])
        num_identical += text.token_ids == expected
        if len(text.token_ids) != query.max_tokens:
            num_miscounted += abs(query.max_tokens - len(text.token_ids))
            wrong.append(f"{text.name}[{text.place}]: {len(text.token_ids)} tokens for {query.max_tokens}")
        both = min(len(text.token_ids), len(expected))
        place = _first_difference(text.token_ids[:both], expected[:both])
        if place is not None:
            served, control = (
                Query(query.prompt + tokens[:both], query.adapter, both - place)
                for tokens in (text.token_ids, expected)
            )
            differing.append(Difference(text, place, served, control))
    num_tokens = sum(len(text.token_ids) for text in texts)
    return Found(len(texts), num_tokens, num_identical, num_miscounted, wrong, differing)


def weigh(found: Found, reader: Reader, least_tolerance: float) -> Comparison:
    """Read what differs.

    Args:
        found: how the texts compare.
        reader: says how likely tokens are.
        least_tolerance: of the phase's dtype, see `TOLERANCES`.
    """
    weighed = reader.deficits([one.served for one in found.differing])
    control_deficit = _largest(reader.deficits([one.expected for one in found.differing]))
    tolerance = max(least_tolerance, 2 * control_deficit)
    wrong = list(found.wrong)
    num_wrong = found.miscounted
    for one, deficits in zip(found.differing, weighed, strict=True):
        worse = [place for place, deficit in enumerate(deficits) if not deficit <= tolerance]
        num_wrong += len(worse)
        if worse:
            told = f"token {one.place + worse[0]} is {deficits[worse[0]]:.4g} below the likeliest"
            wrong.append(f"{one.text.name}[{one.text.place}]: {told}")
    return Comparison(
        texts=found.texts,
        tokens=found.tokens,
        identical=found.identical,
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
