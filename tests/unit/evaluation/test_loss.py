"""The loss of forced tokens: read from the server, by document and position, and compared document by document."""

from dataclasses import asdict

import pytest

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation import target as target_module
from flashmemory_vllm.evaluation.eval_rows import Evaluation
from flashmemory_vllm.evaluation.loss import Losses, LossPart, loss_lines
from flashmemory_vllm.evaluation.target import FORCED_ARGUMENT, FORCED_TOKENS, Target
from tests.unit.evaluation.eval_fakes import LOGPROB, FakeEngine, make_eval_row, make_loss_row
from tests.unit.evaluation.fake_server import MODEL

DOCUMENTS = [list(range(start, start + 30)) for start in (0, 100, 200)]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_module, "SETTLE_SECONDS", 0)


def test_a_server_is_forced_along_what_follows_the_prompt() -> None:
    with FakeEngine(lambda ids: ids, share=0.2) as server:
        (figures,) = LossPart(10, DOCUMENTS, 2).measure(Target.connect("sparse", server.url, MODEL))
        bodies = [body for path, body in server.requests if path.endswith("/completions")]
    by_start = {body["prompt"][0]: body for body in bodies}
    assert {start: body["vllm_xargs"][FORCED_ARGUMENT] for start, body in by_start.items()} == {
        ids[0]: ids[10:] for ids in DOCUMENTS
    }
    assert all(body["ignore_eos"] and body["max_tokens"] == 20 for body in bodies)
    losses = Losses(**figures.details)
    assert losses.weights == [16, 3]
    assert losses.first == [-LOGPROB] * 3
    assert losses.means == [pytest.approx(-LOGPROB)] * 3
    assert losses.likeliest == 1.0
    # Three requests, 2 blocks each by its metrics, and 19 decode steps each
    assert losses.fetched_blocks == pytest.approx(6 / 57, abs=1e-4)
    assert (figures.tokens, figures.questions, figures.score) == (10, 3, None)


def test_a_server_that_forces_nothing_is_refused() -> None:
    with FakeEngine(lambda ids: ids[:20], forces=False) as server:
        target = Target.connect("dense", server.url, MODEL)
        with pytest.raises(ConfigError, match=f"started with --logits-processors {FORCED_TOKENS}"):
            LossPart(10, DOCUMENTS[1:], 1).measure(target)


def test_a_server_that_tells_the_logprobs_of_what_was_forced_is_refused() -> None:
    with FakeEngine(lambda ids: ids, share=0.2, logprob=0.0) as server:
        target = Target.connect("sparse", server.url, MODEL)
        with pytest.raises(ConfigError, match="allowed is one with --logprobs-mode raw_logprobs"):
            LossPart(10, DOCUMENTS[:1], 1).measure(target)


def test_documents_that_do_not_fit_are_refused() -> None:
    with FakeEngine(lambda ids: ids, max_model_len=29) as server:
        target = Target.connect("dense", server.url, MODEL)
        with pytest.raises(ConfigError, match="--lengths and --loss-tokens: prompt and answer take 30 tokens"):
            LossPart(10, DOCUMENTS, 1).measure(target)


def test_documents_are_compared_one_by_one() -> None:
    """Each mean counts as many tokens as it has, and the error is that of the differences."""
    dense = Losses(19, [1.0, 3.0], [[2.0, 2.0], [4.0, 4.0]], 0.5)
    sparse = Losses(19, [1.0, 3.0], [[2.0, 2.9], [4.3, 4.0]], 0.5, 0.25)
    rows = [
        make_loss_row("dense", 0.0, details=asdict(dense)),
        make_loss_row("sparse", 0.0, details=asdict(sparse)),
    ]
    (line,) = loss_lines(Evaluation("m", {"dense": "d", "sparse": "s"}, [*rows, make_eval_row("dense")]))
    gaps = (0.9 * 2 / 18, 0.3 * 16 / 18)
    assert line.dense == pytest.approx(3.0)
    assert line.gap == pytest.approx(sum(gaps) / 2)
    assert line.stderr == pytest.approx((gaps[1] - gaps[0]) / 2)
    assert line.positions == pytest.approx([0.15, 0.45])
    assert (line.documents, line.steps, line.fetched_blocks, line.is_sparse) == (2, 19, 0.25, True)


def test_one_document_has_no_error() -> None:
    one = asdict(Losses(3, [1.0], [[2.0]], 0.5))
    rows = [make_loss_row(side, 0.0, details=one) for side in ("dense", "sparse")]
    (line,) = loss_lines(Evaluation("m", {"dense": "d", "sparse": "s"}, rows))
    assert (line.gap, line.stderr) == (0.0, None)
