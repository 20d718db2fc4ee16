"""A server as the evaluation sees it: which one it is, what it writes, and what its decode steps read."""

import pytest

from flashmemory_vllm.errors import ConfigError, FlashMemoryError
from flashmemory_vllm.evaluation import target as module
from flashmemory_vllm.evaluation.target import Target
from tests.unit.evaluation.eval_fakes import LOGPROB, VERSION, FakeEngine
from tests.unit.evaluation.fake_server import MODEL, FakeServer


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0)


def test_ids_and_log_probabilities_come_if_asked_for() -> None:
    with FakeEngine(lambda ids: [*ids, 7]) as server:
        target = Target.connect("dense", f"{server.url}/v1", MODEL)
        plain, told = target.complete([3], 5), target.complete([3], 5, logprobs=20)
    assert (plain.text, plain.token_ids) == ("3 7", ())
    assert (told.text, told.token_ids, told.logprobs) == ("3 7", [3, 7], [{3: LOGPROB}, {7: LOGPROB}])
    assert (target.url, target.version) == (server.url, VERSION)
    assert (
        server.requests[1][1] | {"prompt": [3], "logprobs": 20, "return_tokens_as_token_ids": True}
        == (server.requests[1][1])
    )


def test_blocks_are_read_from_a_server_that_counts_them() -> None:
    with FakeEngine(lambda _: [1], share=0.25) as server:
        target = Target.connect("sparse", server.url, MODEL)
        target.complete([1], 1)
        assert target.read_blocks() == (25, 100)


def test_stock_vllm_counts_none_and_is_not_taken_for_the_sparse_one() -> None:
    with FakeEngine(lambda _: [1]) as server:
        assert Target.connect("dense", server.url, MODEL).read_blocks() is None
        with pytest.raises(ConfigError, match=r"--base-url is .* allowed is a server with this backend"):
            Target.connect("sparse", server.url, MODEL)


def test_a_server_without_metrics_is_believed() -> None:
    with FakeServer(str) as server:
        target = Target.connect("sparse", server.url, MODEL)
        assert (target.read_blocks(), target.version) == (None, None)


def test_a_server_that_fails_is_named() -> None:
    def fail(_: object) -> list[int]:
        raise ValueError("too long")

    with (
        FakeEngine(fail) as server,
        pytest.raises(FlashMemoryError, match=r"the dense server at .* failed: .*too long"),
    ):
        Target.connect("dense", server.url, MODEL).complete([1], 1)


def test_a_server_of_another_model_is_refused() -> None:
    with FakeServer(str) as server, pytest.raises(ConfigError, match="model is 'other'"):
        Target.connect("dense", server.url, "other")
