"""vLLM's own load generator against our server, with what a serving scenario gives it."""

from pathlib import Path
from typing import Any

import pytest

from flashmemory_vllm.benchmark.serving_client import ServingClient
from flashmemory_vllm.benchmark.serving_run import PREEMPTIONS
from flashmemory_vllm.benchmark.serving_scenario import make_serving_cells
from flashmemory_vllm.cli.server import MODEL_NAME, Server
from flashmemory_vllm.reference import reference_model_path
from tests.unit.benchmark.serving_twins import make_scenario

PROMPT_TOKENS, ANSWER_TOKENS, REQUESTS = 640, 4, 3


@pytest.mark.parametrize("source", ["random", "lengths"])
def test_every_token_is_asked_for_and_counted(
    source: str, server: Server, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    lengths = tmp_path / "lengths.jsonl"
    lengths.write_text(f'{{"input_length": {PROMPT_TOKENS}, "output_length": {ANSWER_TOKENS}}}\n' * REQUESTS)
    sizes: dict[str, Any] = {"prompt_tokens": PROMPT_TOKENS, "output_tokens": ANSWER_TOKENS}
    loads = {
        "random": sizes | {"shared_prefix_tokens": 320, "max_concurrency": 2},
        "lengths": {"lengths": str(lengths), "request_rate": 20.0},
    }
    # Nobody is so slow: all of it is goodput
    scenario = make_scenario(itl_limit_ms=1e6, loads=[{"name": source, "requests": REQUESTS, **loads[source]}])
    (cell,) = make_serving_cells(scenario, ["flashmemory"], {"model": str(reference_model_path())})
    before = server.read_metrics()

    figures = ServingClient(MODEL_NAME).send(cell, server.url)

    after = server.read_metrics()
    assert (figures["completed"], figures["failed"]) == (REQUESTS, 0)
    assert (figures["input_tokens"], figures["output_tokens"]) == (REQUESTS * PROMPT_TOKENS, REQUESTS * ANSWER_TOKENS)
    for name, figure in (("prompt", "input_tokens"), ("generation", "output_tokens")):
        counter = f"vllm:{name}_tokens_total"
        assert after[counter] - before[counter] == figures[figure]
    assert figures["goodput_per_s"] == figures["requests_per_s"] > 0
    for name in ("ttft", "itl"):
        assert 0 < figures[f"{name}_p50_ms"] <= figures[f"{name}_p95_ms"] <= figures[f"{name}_p99_ms"]
    assert after[PREEMPTIONS] == before[PREEMPTIONS]
