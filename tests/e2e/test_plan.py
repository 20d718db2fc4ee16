"""`flashmemory plan` tells beforehand what the server reports."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from flashmemory_vllm.cli import app
from flashmemory_vllm.cli.server import Server
from flashmemory_vllm.reference import reference_model_path
from tests.e2e.conftest import CONFIG, STARTUP_SECONDS

ENGINE: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))


def plan_json(capsys: pytest.CaptureFixture[str], **changes: object) -> dict[str, Any]:
    """The plan for what the server of these tests is started with."""
    arguments = {
        "--model": reference_model_path(),
        "--context": ENGINE["max-model-len"],
        "--options": json.dumps(ENGINE["additional-config"]["flashmemory"]),
    }
    same_names = ("block-size", "dtype", "max-num-seqs", "max-num-batched-tokens", "kv-cache-memory-bytes")
    arguments |= {f"--{name}": ENGINE[name] for name in same_names}
    arguments |= {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    assert app.main(["plan", *(str(word) for pair in arguments.items() for word in pair), "--json"]) == 0
    planned: dict[str, Any] = json.loads(capsys.readouterr().out)
    return planned


def check_sizes(server: Server, planned: dict[str, Any], num_workers: int) -> None:
    """The plan's sizes are those of each worker, which counts them with its first step."""
    server.complete([1, 2, 3], max_tokens=4)
    (engine,) = httpx.get(f"{server.url}/flashmemory/stats").json()["engines"]
    values = engine["values"]
    assert values["workers"] == num_workers
    # Neither counts the null block, which is memory too
    assert planned["num_slots"] == values["slots_total"] / num_workers + 1
    assert planned["num_logical_blocks"] == values["host_blocks_total"] / num_workers + 1


def test_the_plan_is_what_the_server_has(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    check_sizes(server, plan_json(capsys), 1)


def test_the_plan_for_two_ranks_is_what_each_has(
    environment: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a number of slots, so that it follows from all other sizes; an indexer would want all heads."""
    given = ENGINE["additional-config"]["flashmemory"]
    options = {name: value for name, value in given.items() if name not in {"device_slots", "indexer"}}
    changed = {"tensor-parallel-size": 2, "additional-config": {"flashmemory": options}}
    config = tmp_path / "two-ranks.yaml"
    config.write_text(yaml.safe_dump(ENGINE | changed), encoding="utf-8")
    planned = plan_json(capsys, tensor_parallel_size=2, options=json.dumps(options))
    with Server(reference_model_path(), config, STARTUP_SECONDS, environment) as server:
        check_sizes(server, planned, 2)
