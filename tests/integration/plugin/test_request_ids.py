"""The ids that vLLM's own functions make are turned back into those that clients know."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest

from flashmemory_vllm.plugin.request_ids import client_request_id, find_request
from flashmemory_vllm.runtime.status import RequestStatus
from tests.integration.plugin.statuses import make_request


def _assigned(request_id: str) -> Any:
    """A request as vLLM hands it to its engine."""
    request: Any = SimpleNamespace(request_id=request_id, external_req_id=None, params=SamplingParams(n=2))
    InputProcessor.assign_request_id(request)
    return request


@pytest.mark.parametrize("request_id", ["cmpl-1-0", "chatcmpl-deadbeef", "chatcmpl-a-deadbeef", "chatcmpl-3_x"])
def test_what_vllm_appends_is_taken_off(request_id: str) -> None:
    request = _assigned(request_id)
    assert request.request_id != request_id
    assert client_request_id(request.request_id) == request_id


def test_each_answer_to_a_prompt_has_the_id_of_all() -> None:
    parent = ParentRequest(_assigned("chatcmpl-1"))
    children = [parent.get_child_info(index)[0] for index in range(2)]
    assert len(set(children)) == 2
    assert {client_request_id(child) for child in children} == {"chatcmpl-1"}


def test_nothing_is_taken_off_where_vllm_appends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")
    request = _assigned("chatcmpl-deadbeef")
    assert request.request_id == client_request_id(request.request_id) == "chatcmpl-deadbeef"


def test_an_exact_id_comes_before_a_similar_one() -> None:
    requests = [RequestStatus(**make_request(name)) for name in ("cmpl-a-1", "cmpl-a", "cmpl-b-0", "cmpl-b-1")]
    found = {name: find_request(requests, name) for name in ("cmpl-a", "cmpl-b", "cmpl-b-1", "cmpl-b-1-0123abcd", "b")}
    assert {name: one and one.request_id for name, one in found.items()} == {
        "cmpl-a": "cmpl-a",
        "cmpl-b": "cmpl-b-0",
        "cmpl-b-1": "cmpl-b-1",
        "cmpl-b-1-0123abcd": "cmpl-b-1",
        "b": None,
    }
