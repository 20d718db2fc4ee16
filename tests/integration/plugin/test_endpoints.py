"""Our HTTP routes, discovered and wired by vLLM's own functions."""

import argparse
import asyncio
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import assume, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.plugins.endpoint_plugins.interface import (
    EndpointPlugin,
    attach_endpoint_plugins,
    init_endpoint_plugins_state,
)

from flashmemory_vllm.observability.counters import SCHEDULER, CounterWriter, worker_name
from flashmemory_vllm.observability.metrics import SERIES
from flashmemory_vllm.plugin.counter_files import engine_counters_directory
from flashmemory_vllm.plugin.endpoints import FlashMemoryEndpoints
from flashmemory_vllm.plugin.status_reader import Status, StatusReader
from tests.integration.plugin.engines import make_vllm_config
from tests.integration.plugin.statuses import StatusEngine, make_request, make_status

DATA_ROUTES = ["/flashmemory/stats", "/flashmemory/status", "/flashmemory/requests", "/flashmemory/requests/cmpl-a-0"]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
PAGE_ROUTES = ["/flashmemory", "/flashmemory/app.js", "/flashmemory/style.css"]


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("VLLM_PLUGINS", "flashmemory")


def _make_app(engine_client: Any, api_key: Sequence[str] = ()) -> FastAPI:
    app = FastAPI()
    attach_endpoint_plugins(app, ("generate",))
    args = argparse.Namespace(api_key=list(api_key), log_error_stack=False)
    app.state.args = args
    init_exception_handler(app)
    asyncio.run(init_endpoint_plugins_state(engine_client, app.state, args))
    return app


def _make_client(vllm_config: Any) -> TestClient:
    return TestClient(_make_app(SimpleNamespace(vllm_config=vllm_config)))


def _make_status_client(*statuses: dict[str, Any], api_key: Sequence[str] = ()) -> TestClient:
    return TestClient(_make_app(StatusEngine(statuses or (make_status(make_request("cmpl-a-0")),)), api_key))


def _message(response: Any) -> str:
    message: str = response.json()["error"]["message"]
    return message


def test_it_is_an_endpoint_plugin() -> None:
    assert isinstance(FlashMemoryEndpoints(), EndpointPlugin)


def test_stats_are_those_of_the_counters() -> None:
    config = make_vllm_config()
    client = _make_client(config)
    with CounterWriter.create(engine_counters_directory(config), worker_name(0)) as worker:
        worker.add("evictions_total", 5)
        response = client.get("/flashmemory/stats")
    assert response.status_code == 200
    (engine,) = response.json()["engines"]
    assert engine["engine"] == 0
    assert engine["values"]["evictions_total"] == 5
    assert set(engine["values"]) == set(SERIES)


@pytest.mark.parametrize("route", DATA_ROUTES)
def test_another_backend_has_nothing_to_tell(route: str) -> None:
    response = _make_client(make_vllm_config(backend="FLASH_ATTN")).get(route)
    assert response.status_code == HTTPStatus.NOT_FOUND
    assert "--attention-backend flashmemory" in _message(response)


@pytest.mark.parametrize("route", DATA_ROUTES + PAGE_ROUTES)
def test_the_routes_exist_only_if_allowed(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    assert _make_client(make_vllm_config()).get(route).json() == {"detail": "Not Found"}


@pytest.mark.parametrize(
    ("route", "model"),
    [
        ("/flashmemory/stats", "Stats"),
        ("/flashmemory/status", "Status"),
        ("/flashmemory/requests", "Requests"),
        ("/flashmemory/requests/{request_id}", "OneRequest"),
    ],
)
def test_the_answers_are_documented(route: str, model: str) -> None:
    paths = _make_status_client().get("/openapi.json").json()["paths"]
    answers = paths[route]["get"]["responses"]
    assert answers["200"]["content"]["application/json"]["schema"] == {"$ref": f"#/components/schemas/{model}"}
    assert {"401", "404"} <= set(answers)


def test_status_is_that_of_rank_0() -> None:
    told = make_status(make_request("cmpl-a-0"), rank=0)
    client = TestClient(_make_app(StatusEngine([told], num_ranks=2)))
    answer = client.get("/flashmemory/status", params={"strips": 1}).json()
    assert answer == Status.model_validate(told).model_dump(mode="json")


def test_strips_come_when_they_are_asked_for_and_not_for_everybody() -> None:
    client = _make_status_client(make_status(make_request("cmpl-a-0"), make_request("cmpl-b-0")))

    def has_strips(route: str, **params: int) -> list[bool]:
        answer = client.get(f"/flashmemory/{route}", params=params).json()
        return [request["strips"] is not None for request in answer["requests"]]

    assert has_strips("status") == has_strips("requests") == [False, False]
    assert has_strips("status", strips=1) == has_strips("requests", strips=1) == [True, False]
    assert client.get("/flashmemory/status", params={"strips": 17}).status_code == HTTPStatus.BAD_REQUEST


def test_one_request_has_its_strips_however_many_there_are() -> None:
    requests = [make_request(f"cmpl-{index}-0") for index in range(20)]
    one = _make_status_client(make_status(*requests)).get("/flashmemory/requests/cmpl-19-0").json()
    assert one["strips"] == requests[19]["strips"]


def test_requests_are_those_of_the_status() -> None:
    told = make_status(make_request("cmpl-a-0"), make_request("cmpl-b-0"), step=7)
    client = _make_status_client(told)
    listed = client.get("/flashmemory/requests", params={"strips": 2}).json()
    assert (listed["step"], [request["request_id"] for request in listed["requests"]]) == (7, ["cmpl-a-0", "cmpl-b-0"])
    one = client.get("/flashmemory/requests/cmpl-b-0").json()
    assert one == listed["requests"][1] | {"step": 7}


@pytest.mark.parametrize("request_id", ["cmpl-a/b c-0", "cmpl-a/b c-0-0123abcd", "cmpl-a/b c"])
def test_a_request_is_found_by_each_of_its_ids(request_id: str) -> None:
    client = _make_status_client(make_status(make_request("cmpl-other-0"), make_request("cmpl-a/b c-0")))
    response = client.get(f"/flashmemory/requests/{request_id}")
    assert response.json()["engine_request_id"] == "cmpl-a/b c-0-0123abcd"


def test_a_request_that_does_not_run_is_not_found() -> None:
    response = _make_status_client().get("/flashmemory/requests/cmpl-gone")
    assert response.status_code == HTTPStatus.NOT_FOUND
    assert "no request 'cmpl-gone' runs" in _message(response)


@pytest.mark.parametrize("route", DATA_ROUTES)
@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Bearer", "Basic first", "first"])
def test_data_needs_an_api_key(route: str, authorization: str | None) -> None:
    client = _make_status_client(api_key=["first", "second"])
    response = client.get(route, headers={"Authorization": authorization} if authorization else {})
    assert response.status_code == HTTPStatus.UNAUTHORIZED
    assert "Authorization: Bearer KEY" in _message(response)


@pytest.mark.parametrize("route", DATA_ROUTES)
@pytest.mark.parametrize("key", ["first", "second"])
def test_each_of_the_keys_is_right(route: str, key: str) -> None:
    client = _make_status_client(api_key=["first", "second"])
    assert client.get(route, headers={"Authorization": f"bearer {key}"}).status_code == HTTPStatus.OK


def test_the_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    client = _make_status_client()
    assert client.get("/flashmemory/status").status_code == HTTPStatus.UNAUTHORIZED
    answer = client.get("/flashmemory/status", headers={"Authorization": "Bearer secret"})
    assert answer.status_code == HTTPStatus.OK


@pytest.mark.parametrize("route", PAGE_ROUTES)
def test_the_page_needs_no_key_and_nothing_from_elsewhere(route: str) -> None:
    response = _make_status_client(api_key=["secret"]).get(route)
    assert response.status_code == HTTPStatus.OK
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    without_names = response.text.replace("http://www.w3.org/2000/svg", "")
    assert "://" not in without_names


def test_a_status_tells_of_the_blocks_that_only_the_scheduler_knows() -> None:
    engine = StatusEngine([make_status()])
    client, directory = TestClient(_make_app(engine)), engine_counters_directory(engine.vllm_config)
    with CounterWriter.create(directory, worker_name(0)), CounterWriter.create(directory, SCHEDULER) as scheduler:
        scheduler.set("native_blocks_total", 9)
        scheduler.set("native_blocks_used", 4)
        answer = client.get("/flashmemory/status").json()
    assert (answer["native_blocks_used"], answer["native_blocks_total"]) == (4, 9)


def test_many_who_ask_at_once_share_one_answer() -> None:
    engine = StatusEngine([make_status()], seconds=0.05)

    async def ask() -> list[Status]:
        reader = StatusReader(engine, fresh_seconds=0)
        together = await asyncio.gather(*(reader.read() for _ in range(20)))
        return [*together, await reader.read()]

    assert len(asyncio.run(ask())) == 21
    assert engine.num_calls == 2


def test_a_fresh_answer_is_given_again() -> None:
    engine = StatusEngine([make_status()])

    async def ask() -> None:
        reader = StatusReader(engine, fresh_seconds=60)
        for _ in range(5):
            await reader.read()

    asyncio.run(ask())
    assert engine.num_calls == 1


def test_an_engine_that_does_not_answer_is_reported() -> None:
    app = _make_app(StatusEngine([make_status()], seconds=30))
    app.state.flashmemory_status = StatusReader(StatusEngine([make_status()], seconds=30), answer_seconds=0.05)
    response = TestClient(app).get("/flashmemory/status")
    assert response.status_code == HTTPStatus.SERVICE_UNAVAILABLE
    assert "did not answer within 0.05 s" in _message(response)


def test_a_request_id_may_have_slashes() -> None:
    client = _make_status_client(make_status(make_request("team/42-0")))
    response = client.get("/flashmemory/requests/team/42-0")
    assert response.status_code == HTTPStatus.OK
    assert response.json()["request_id"] == "team/42-0"


def _operations() -> Iterator[Any]:
    """Our routes as a running server's schema tells them."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", _make_app(StatusEngine([make_status()])))
    for found in schema.include(path_regex="^/flashmemory").get_all_operations():
        assert isinstance(found, Ok)
        yield found.ok()


def has_line_break(case: schemathesis.Case[Any]) -> bool:
    """Whether a path has one: it is no route's, and the framework answers it with a 404 in its own form."""
    return any("\n" in unquote(str(value)) for value in (case.path_parameters or {}).values())


def test_no_request_is_a_server_error_or_answers_what_is_not_documented() -> None:
    operations = list(_operations())
    assert [operation.path for operation in operations] == [
        "/flashmemory/stats",
        "/flashmemory/status",
        "/flashmemory/requests",
        "/flashmemory/requests/{request_id}",
    ]
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(deadline=None)
        def call(case: schemathesis.Case[Any]) -> None:
            assume(not has_line_break(case))
            case.call_and_validate(checks=CHECKS)

        call()
