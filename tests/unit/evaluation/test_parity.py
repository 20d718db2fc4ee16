"""Parity: what agrees, where it ends, and how far apart distributions are."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.needles import Needle
from flashmemory_vllm.evaluation.parity import Comparison, ParityPart, kl_lower_bound
from flashmemory_vllm.evaluation.target import Completion, Target
from tests.unit.evaluation.eval_fakes import FakeEngine
from tests.unit.evaluation.fake_server import MODEL

PROMPTS: list[Sequence[int]] = [[1, 2], [3, 4], [5, 6]]


class Prompts:
    """Three prompts."""

    language = "numbers"

    def needles(self, tokens: int, depths: Sequence[float], seed: int) -> list[Needle]:  # noqa: ARG002 - a protocol's
        return []

    def continuations(self, tokens: int, count: int, seed: int) -> list[Sequence[int]]:  # noqa: ARG002 - a protocol's
        return PROMPTS[:count]


def completion(*ids: int) -> Completion:
    """Each token likely, and at each position another one beside it."""
    return Completion("", ids, [{token: math.log(0.75), 99: math.log(0.125)} for token in ids])


def test_texts_agree_up_to_the_first_token_that_differs() -> None:
    dense = [completion(1, 2, 3, 4), completion(5, 6), completion(7, 8, 9)]
    compared = Comparison.of(dense, [completion(1, 2, 9, 4), completion(5, 6), completion(7)])
    assert compared.agreeing == [2, 2, 1]
    assert compared.identical == [False, True, False]
    assert compared.divergences == [2, 1]
    assert compared.median_divergence == 1.5
    assert compared.identical_share == pytest.approx(1 / 3)
    assert compared.agreeing_share == pytest.approx(5 / 9)
    # Of the differing position too, as its prefix is the same; no further, and not beyond a text's end
    assert [len(values) for values in compared.kl] == [3, 2, 1]
    assert compared.prefill_kl == 0
    assert compared.kl[0][2] > 0
    assert compared.max_decode_kl == compared.kl[0][2]
    assert compared.decode_kl == pytest.approx(compared.kl[0][2] / 3, rel=1e-3)


def test_texts_that_are_equal_never_part() -> None:
    same = [completion(1, 2)]
    compared = Comparison.of(same, same)
    assert (compared.identical_share, compared.agreeing_share, compared.divergences) == (1, 1, [])
    assert compared.median_divergence is None


def test_kl_of_equal_distributions_is_zero() -> None:
    p = {1: math.log(0.5), 2: math.log(0.3)}
    assert kl_lower_bound(p, p) == 0


def test_kl_is_exact_where_all_is_told() -> None:
    p, q = {1: math.log(0.5), 2: math.log(0.5)}, {1: math.log(0.9), 2: math.log(0.1)}
    assert kl_lower_bound(p, q) == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))


def test_kl_knows_that_a_token_which_is_not_told_is_unlikely() -> None:
    """A token of 3/4 becomes one of at most 1/8."""
    p, q = ({token: math.log(0.75), 9: math.log(0.125)} for token in (1, 2))
    assert kl_lower_bound(p, q) == pytest.approx(0.75 * math.log(0.75 / 0.125) + 0.125 * math.log(0.125 / 0.75))


def test_kl_of_the_likeliest_tokens_is_below_the_true_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        p, q = (np.exp(logits) / np.exp(logits).sum() for logits in rng.normal(0, 2, (2, 100)))
        true = float((p * np.log(p / q)).sum())
        tops = [{int(i): math.log(side[i]) for i in np.argsort(-side)[:20]} for side in (p, q)]
        assert 0 <= kl_lower_bound(*tops) <= true + 1e-9


def test_the_dense_server_is_its_own_control_and_the_sparse_one_is_compared_with_it(tmp_path: Path) -> None:
    part = ParityPart(2, 3, 3, 0, Prompts(), tmp_path)
    with FakeEngine(lambda ids: [ids[0], 0, 0, 0]) as dense, FakeEngine(lambda ids: [ids[0], 0, ids[0] // 3]) as other:
        (control,) = part.measure(Target.connect("dense", dense.url, MODEL))
        assert len(dense.requests) == 2 * len(PROMPTS)
        assert {body["temperature"] for _, body in dense.requests} == {0}
        (figures,) = ParityPart(2, 3, 3, 0, Prompts(), tmp_path).measure(
            Target("sparse", other.url, MODEL, Target.connect("dense", other.url, MODEL).client, 9, None)
        )
    assert Comparison(**control.details).identical == [True] * 3
    compared = Comparison(**figures.details)
    assert compared.lengths == [3, 3, 3]
    assert compared.agreeing == [3, 2, 2]
    assert (figures.questions, figures.score) == (3, None)


def test_an_evaluation_may_have_several_settings(tmp_path: Path) -> None:
    """The dense server was asked for both before the sparse one was asked for the first."""

    class Seeded(Prompts):
        def continuations(self, tokens: int, count: int, seed: int) -> list[Sequence[int]]:
            return [[seed, token] for _, token in super().continuations(tokens, count, seed)]

    first, *others = (ParityPart(2, 3, *choice, Seeded(), tmp_path) for choice in ((3, 0), (3, 1), (2, 0)))
    with FakeEngine(lambda ids: [*ids, 0]) as dense, FakeEngine(lambda ids: [*ids, 0], share=0.1) as sparse:
        for part in (first, *others):
            part.measure(Target.connect("dense", dense.url, MODEL))
        (figures,) = first.measure(Target.connect("sparse", sparse.url, MODEL))
    assert Comparison(**figures.details).identical == [True] * 3


def test_a_sparse_server_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    with (
        FakeEngine(lambda _: [1], share=0.1) as server,
        pytest.raises(ConfigError, match=r"dense-2-3x3-seed0\.json is gone"),
    ):
        ParityPart(2, 3, 3, 0, Prompts(), tmp_path).measure(Target.connect("sparse", server.url, MODEL))


def test_a_prompt_must_fit(tmp_path: Path) -> None:
    with FakeEngine(lambda _: [1], max_model_len=4) as server:
        target = Target.connect("dense", server.url, MODEL)
        with pytest.raises(ConfigError, match="--lengths and --parity-tokens: prompt and answer take 5 tokens"):
            ParityPart(2, 3, 3, 0, Prompts(), tmp_path).measure(target)
