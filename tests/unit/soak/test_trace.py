"""A trace has something of everything, is the same for the same seed, and comes back from its file."""

from pathlib import Path

import pytest

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.soak.trace import Trace
from tests.unit.soak.traces import trace


def test_the_same_seed_gives_the_same_trace_and_another_one_another() -> None:
    assert trace() == trace()
    assert trace().requests != trace(seed=1).requests


def test_it_comes_back_from_its_file(tmp_path: Path) -> None:
    drawn = trace(phase="sparse", is_async=True, runner="v2")
    drawn.save(tmp_path / "deep" / "trace.json")
    assert Trace.load(tmp_path / "deep" / "trace.json") == drawn


@pytest.mark.parametrize("text", ["", "[]", '{"settings": {}, "contexts": [], "requests": []}'])
def test_another_file_is_refused_by_its_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"{path} is no trace of a soak .* allowed is what --keep wrote"):
        Trace.load(path)


def test_dense_requests_are_of_every_kind() -> None:
    drawn = trace(num_requests=400, mixes_adapters=True)
    requests, block_size = drawn.requests, drawn.settings.block_size
    lengths = {len(drawn.prompt(request)) for request in requests}
    assert {1, 2} <= lengths
    assert any(length % block_size == 0 for length in lengths)
    assert any(length % block_size == 1 and length > 1 for length in lengths)
    assert {request.num_answers for request in requests} == {1, 2, 3}
    assert {request.adapter for request in requests} == {0, 1, 2}
    assert {request.is_streamed for request in requests} == {True, False}
    assert {request.abort_after_steps for request in requests} >= {None, 0, 1}
    assert all(request.answer == () for request in requests)
    shared = [request.context for request in requests if request.num_context_tokens > block_size]
    assert len(set(shared)) < len(shared)


def test_on_a_cpu_every_dense_request_has_an_adapter_or_none_has() -> None:
    assert {request.adapter for request in trace().requests} == {1, 2}
    assert {request.adapter for request in trace(adapters=0).requests} == {0}


def test_sparse_requests_ask_and_have_one_right_answer() -> None:
    drawn = trace(phase="sparse")
    for request in drawn.requests:
        assert 0 < len(request.answer) == request.max_tokens
        assert request.num_context_tokens == len(drawn.contexts[request.context])
        assert request.adapter == 0
    least, most = drawn.settings.prompt_tokens
    assert all(least <= len(drawn.prompt(request)) <= most for request in drawn.requests)


def test_all_fit_in_the_engine_and_contexts_do_not_fit_in_its_slots() -> None:
    drawn = trace(num_contexts=60, overcommit=10.0)
    chosen = drawn.settings
    assert all(len(drawn.prompt(one)) + one.max_tokens <= chosen.max_model_len for one in drawn.requests)
    blocks = sum(len(context) // chosen.block_size for context in drawn.contexts)
    assert blocks > 8 * chosen.device_slots
    assert chosen.overcommit >= 10
    assert chosen.logical_blocks <= chosen.max_num_seqs * chosen.max_model_len // chosen.block_size + 1


def test_prompts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"prompt tokens: a request of \d+, allowed is max_model_len 256"):
        trace(prompt_tokens=(100, 250), output_tokens=(100, 100), max_model_len=256)
