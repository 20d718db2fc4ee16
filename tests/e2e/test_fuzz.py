"""What no client would send, against a running server: no error of ours, nothing stuck, all slots free afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from random import Random
from typing import Any

import pytest
import schemathesis
from hypothesis import assume, given, settings
from openai import OpenAI
from schemathesis.core.result import Ok

from flashmemory_vllm.cli.server import Server
from tests.e2e.questions import make_questions
from tests.e2e.raw_http import (
    ROUTES,
    Sent,
    abort,
    bad_bodies,
    completion,
    connection,
    exchange,
    malformed,
    request,
    statuses,
)
from tests.e2e.test_openai_api import complete, wait_until
from tests.integration.plugin.test_endpoints import CHECKS, has_line_break

NUM_EXAMPLES = 20
NUM_ABORTED, NUM_SLOW, NUM_PIPELINED = 12, 40, 30
QUESTION_TOKENS = 2048


@pytest.fixture(autouse=True)
def _served_afterwards(server: Server, client: OpenAI) -> Iterator[None]:
    """Whatever a test sent, the server answers a question right and no request holds anything."""
    yield
    (question,) = make_questions("multikey", QUESTION_TOKENS, 1, seed=5)
    assert complete(client, question) == question.answer
    assert wait_until(lambda: _busy(server) == {})


def _busy(server: Server) -> dict[str, float]:
    """What requests still hold, by metric."""
    names = ("flashmemory:resident_blocks", "flashmemory:total_blocks", "vllm:num_requests_running")
    values = server.read_metrics()
    return {name: values[name] for name in (*names, "vllm:num_requests_waiting") if values[name]}


def _errors(all_sent: list[Sent], codes: list[list[int]]) -> list[tuple[str, list[int]]]:
    """What the server takes for a fault of its own."""
    return [
        (sent.name, of_sent) for sent, of_sent in zip(all_sent, codes, strict=True) if max(of_sent, default=0) >= 500
    ]


def test_malformed_requests_are_no_errors_of_the_server(server: Server) -> None:
    all_sent = list(malformed(Random(0)))
    codes = [statuses(exchange(server.url, sent)) for sent in all_sent]
    assert len(codes) > 120
    assert _errors(all_sent, codes) == []
    # What ends like a request is answered, once
    assert [
        sent.name for sent, of_sent in zip(all_sent, codes, strict=True) if sent.is_whole and len(of_sent) != 1
    ] == []
    assert {code for of_sent in codes for code in of_sent} >= {200, 400, 404, 405}


def test_bodies_that_are_none_are_no_errors_of_the_server(server: Server) -> None:
    all_sent = list(bad_bodies(Random(1)))
    codes = [statuses(exchange(server.url, sent)) for sent in all_sent]
    assert _errors(all_sent, codes) == []
    assert {code for of_sent in codes for code in of_sent} >= {400}


def test_requests_in_one_go_are_answered_in_order(server: Server) -> None:
    """Pipelining: completions between questions about the server."""
    open_end = [request("GET", route).replace(b"Connection: close\r\n", b"") for route in ROUTES]
    sent = [
        completion("a", 2, stream=False, close=False) if index % 10 == 9 else open_end[index % len(open_end)]
        for index in range(NUM_PIPELINED)
    ]
    in_one_go = Sent("pipelined", b"".join((*sent, request("GET", ROUTES[0]))))
    codes = statuses(exchange(server.url, in_one_go))
    expected = [404 if b"/requests/a" in one else 200 for one in sent]
    assert codes == [*expected, 200]


def test_connections_that_never_finish_their_request_hold_up_nobody(server: Server, client: OpenAI) -> None:
    """Slow loris: each connection has sent a part of a request; others are served beside them."""
    (question,) = make_questions("multikey", QUESTION_TOKENS, 1, seed=6)
    sent = request("GET", ROUTES[1])
    with ExitStack() as stack:
        slow = [stack.enter_context(connection(server.url)) for _ in range(NUM_SLOW)]
        for index, raw in enumerate(slow):
            raw.sendall(sent[: 1 + index % (len(sent) - 1)])
        assert complete(client, question) == question.answer
        for raw in slow[: NUM_SLOW // 2]:
            raw.sendall(b"X")
        for route in ROUTES:
            assert statuses(exchange(server.url, Sent(route, request("GET", route)))) in ([200], [404])


def test_streams_that_are_cut_off_give_everything_back(server: Server) -> None:
    (question,) = make_questions("multikey", QUESTION_TOKENS, 1, seed=7)
    for index in range(NUM_ABORTED):
        with connection(server.url) as raw:
            raw.sendall(completion(question.prompt, 20_000, stream=True))
            # Some are cut off before their first byte, some while tokens come
            for _ in range(index % 4):
                assert raw.recv(1 << 12)
            abort(raw)
    assert wait_until(lambda: _busy(server) == {})


def test_no_request_that_the_schema_allows_is_an_error(server: Server) -> None:
    """As in process, with the schema and the engine of a running server."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [
        found.ok() for found in schema.include(path_regex="^/flashmemory").get_all_operations() if isinstance(found, Ok)
    ]
    assert len(operations) >= 4
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(deadline=None, max_examples=NUM_EXAMPLES)
        def call(case: schemathesis.Case[Any]) -> None:
            assume(not has_line_break(case))
            case.call_and_validate(checks=CHECKS)

        call()
