"""One bit of KV changes in host memory: its request fails and says so, those beside it and its next try are right."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from flashmemory_vllm.plugin.broken_pages import BROKEN_KV
from tests.helpers.engine import EngineRun, run_main
from tests.helpers.tiny_model import random_prompts, save_tiny_llama

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's CUDA build has no CPU backend"),
]

NUM_TOKENS = 8
NUM_SLOTS = 19


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"), num_layers=2)


def _run(
    model: Path, mode: str, runner: Literal["v1", "v2"] = "v1", is_async: bool = False, **options: Any
) -> dict[str, Any]:
    """A request of four blocks, as many others as push it out of the slots, and one of four blocks beside it."""
    rounds = [random_prompts(1, 120, 120), random_prompts(6, 120, 120, seed=1), random_prompts(1, 120, 120, seed=2)]
    ours = {
        "resident_ratio": 1.0,
        "device_slots": NUM_SLOTS,
        "growth_reserve_tokens": 0,
        "host_memory_gib": 0.125,
        "page_checksums": mode,
        "check_integrity": True,
        **options,
    }
    engine = {
        "dtype": "float32",
        "block_size": 32,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "kv_cache_memory_bytes": 1 << 27,
    }
    run = EngineRun(model, rounds, NUM_TOKENS, ours, engine, runner=runner, async_scheduling=is_async)
    return run_main("tests.integration.broken_kv_main", run)


def _assert_the_request_failed_alone(result: dict[str, Any]) -> None:
    assert (result["again"]["finish"], result["again"]["stop"]) == ("error", BROKEN_KV)
    assert result["again"]["tokens"] == [], "a token was computed from it"
    assert result["beside"] == result["beside alone"]
    assert result["beside"]["finish"] == "length"
    assert result["third"] == result["first"]
    assert result["counters"]["page_checksum_failures_total"] >= 1
    assert result["counters"]["compared_pages_total"] > result["counters"]["page_checksum_failures_total"]


def test_full(model: Path) -> None:
    _assert_the_request_failed_alone(_run(model, "full"))


def test_full_with_two_layer_groups_where_only_one_is_broken(model: Path) -> None:
    _assert_the_request_failed_alone(_run(model, "full", layer_groups=2))


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_full_with_model_runner_v2(model: Path, is_async: bool) -> None:
    _assert_the_request_failed_alone(_run(model, "full", "v2", is_async))


def test_off_nobody_notices(model: Path) -> None:
    """What the tests above would see without the checksums: another text, and no word about it."""
    result = _run(model, "off")
    assert result["again"]["finish"] == "length"
    assert result["again"]["tokens"] != result["first"]["tokens"]
    assert result["counters"]["compared_pages_total"] == 0
