"""Our HTTP route, discovered and wired by vLLM's own functions."""

import argparse
import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.plugins.endpoint_plugins.interface import (
    EndpointPlugin,
    attach_endpoint_plugins,
    init_endpoint_plugins_state,
)

from flashmemory_vllm.observability.counters import CounterWriter, worker_name
from flashmemory_vllm.observability.metrics import SERIES
from flashmemory_vllm.plugin.counter_files import engine_counters_directory
from flashmemory_vllm.plugin.endpoints import FlashMemoryEndpoints
from tests.integration.plugin.engines import make_vllm_config


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("VLLM_PLUGINS", "flashmemory")


def _make_client(vllm_config: Any) -> TestClient:
    app = FastAPI()
    attach_endpoint_plugins(app, ("generate",))
    engine_client: Any = SimpleNamespace(vllm_config=vllm_config)
    asyncio.run(init_endpoint_plugins_state(engine_client, app.state, argparse.Namespace()))
    return TestClient(app)


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


def test_another_backend_has_no_stats() -> None:
    response = _make_client(make_vllm_config(backend="FLASH_ATTN")).get("/flashmemory/stats")
    assert response.status_code == 404
    assert "--attention-backend flashmemory" in response.json()["detail"]


def test_the_route_exists_only_if_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    assert _make_client(make_vllm_config()).get("/flashmemory/stats").json() == {"detail": "Not Found"}


def test_the_answer_is_documented() -> None:
    schema = _make_client(make_vllm_config()).get("/openapi.json").json()
    answer = schema["paths"]["/flashmemory/stats"]["get"]["responses"]["200"]
    assert answer["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Stats"}
