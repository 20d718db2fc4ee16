"""A request some of whose KV becomes NaN in host memory, and what must become of it and of its neighbours."""

from pathlib import Path
from typing import Any, Literal

from flashmemory_vllm.plugin.broken_pages import BROKEN_KV
from tests.helpers.engine import EngineRun, run_main
from tests.helpers.tiny_model import random_prompts

NUM_TOKENS = 8
NUM_SLOTS = 19


def ask_around_a_broken_block(
    model: Path,
    mode: str,
    runner: Literal["v1", "v2"] = "v1",
    is_async: bool = False,
    engine: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """A request of four blocks, as many others as push it out of the slots, and one of four blocks beside it.

    Args:
        model: its folder.
        mode: `page_checksums`.
        runner: vLLM's model runner.
        is_async: whether steps are scheduled before the one before them has returned.
        engine: further arguments of `vllm.LLM`.
        options: further options of ours.

    Returns:
        What `tests/integration/broken_kv_main.py` found.
    """
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
    arguments = {
        "dtype": "float32",
        "block_size": 32,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "kv_cache_memory_bytes": 1 << 27,
        **(engine or {}),
    }
    run = EngineRun(model, rounds, NUM_TOKENS, ours, arguments, runner=runner, async_scheduling=is_async)
    return run_main("tests.integration.broken_kv_main", run)


def assert_the_request_failed_alone(result: dict[str, Any]) -> None:
    """The broken request ends with an error and no token, its neighbour and its next try are right."""
    assert (result["again"]["finish"], result["again"]["stop"]) == ("error", BROKEN_KV)
    assert result["again"]["tokens"] == [], "a token was computed from it"
    assert result["beside"] == result["beside alone"]
    assert result["beside"]["finish"] == "length"
    assert result["third"] == result["first"]
    assert result["counters"]["page_checksum_failures_total"] >= 1
    assert result["counters"]["compared_pages_total"] > result["counters"]["page_checksum_failures_total"]
