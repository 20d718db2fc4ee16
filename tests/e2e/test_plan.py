"""`flashmemory plan` tells beforehand what the server reports."""

import json
from typing import Any

import httpx
import pytest
import yaml

from flashmemory_vllm.cli import app
from flashmemory_vllm.cli.server import Server
from flashmemory_vllm.reference import reference_model_path
from tests.e2e.conftest import CONFIG

ENGINE: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))


def test_the_plan_is_what_the_server_has(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {
        "--model": reference_model_path(),
        "--context": ENGINE["max-model-len"],
        "--kv-dtype": ENGINE["dtype"],
        "--options": json.dumps(ENGINE["additional-config"]["flashmemory"]),
    }
    same_names = ("block-size", "max-num-seqs", "max-num-batched-tokens", "kv-cache-memory-bytes")
    arguments |= {f"--{name}": ENGINE[name] for name in same_names}
    assert app.main(["plan", *(str(word) for pair in arguments.items() for word in pair), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)

    # The worker reports its sizes with each step
    server.complete([1, 2, 3], max_tokens=4)
    (engine,) = httpx.get(f"{server.url}/flashmemory/stats").json()["engines"]
    # Neither counts the null block, which is memory too
    assert planned["num_slots"] == engine["values"]["slots_total"] + 1
    assert planned["num_logical_blocks"] == engine["values"]["host_blocks_total"] + 1
