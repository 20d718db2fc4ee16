"""Models with windows or states beside full attention: one group of blocks is ours, the others are vLLM's own.

With a resident ratio of 1 every text is vLLM's, while blocks of the managed layers come and go; below it, what they
attend to is what the oracle says. FLASHMEMORY_HYBRIDS=thorough compares more models with vLLM.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flashmemory_vllm.cli.plan import model_sizes, read_model_fields
from flashmemory_vllm.runtime.native import native_pool
from tests.helpers.engine import V1_RUNNER, V2_RUNNER, EngineRun, run_engine
from tests.helpers.tiny_model import (
    random_prompts,
    save_tiny_gemma3,
    save_tiny_gpt_oss,
    save_tiny_nemotron_h,
    save_tiny_qwen3_next,
)

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's CUDA build has no CPU backend"),
]

BLOCK_SIZE = 32
TOLERANCE = 1e-5
Save = Callable[[Path], Path]
IS_THOROUGH = os.environ.get("FLASHMEMORY_HYBRIDS") == "thorough"
OTHERS: list[Save] = [save_tiny_gpt_oss, save_tiny_nemotron_h] if IS_THOROUGH else []
# Model and ranks of each
COMPARED = [(save, ranks) for save in (save_tiny_gemma3, *OTHERS) for ranks in ((1, 2) if IS_THOROUGH else (1,))]


ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "block_size": BLOCK_SIZE,
    "max_model_len": 512,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 1 << 28,
}
# All blocks, but too few slots for them
TIGHT = {
    "resident_ratio": 1.0,
    "device_slots": 19,
    "growth_reserve_tokens": 0,
    "host_memory_gib": 0.25,
    "check_integrity": True,
    "poison_free_slots": True,
}


@pytest.mark.parametrize(("save", "num_ranks"), COMPARED)
def test_texts_are_vllms(save: Save, num_ranks: int, tmp_path: Path) -> None:
    """And prefix hits are as long; requests are evicted from, recalled for, and preempted, on each rank."""
    first = random_prompts(4, 70, 130)
    rounds = [first, [*random_prompts(2, 70, 130, seed=1), *first[:2]]]
    stock = EngineRun(save(tmp_path), rounds, 40, engine=ENGINE | {"tensor_parallel_size": num_ranks})
    theirs, ours = run_engine(stock), run_engine(replace(stock, flashmemory=TIGHT))
    assert ours.tokens == theirs.tokens
    assert min(len(set(text)) for texts in ours.tokens for text in texts) > 5, "texts that say little show little"
    counted = ours.counters
    assert counted["slots_total"] < counted["host_blocks_total"]
    assert counted["evictions_total"] > 0
    assert counted["recalled_blocks_total"] > 0
    assert counted["decode_resident_blocks_total"] == counted["decode_context_blocks_total"]
    assert ours.metrics["prefix_cache_hits"] >= theirs.metrics["prefix_cache_hits"]
    # No prompt here is as long as a block of states
    assert theirs.metrics["prefix_cache_hits"] > 0 or save is save_tiny_nemotron_h
    assert ours.metrics["preemptions"] > theirs.metrics["preemptions"] == 0
    # Of workers in processes of their own it is not known
    assert ours.model_runner == theirs.model_runner == (V1_RUNNER if num_ranks == 1 else "")
    assert counted["slots_total"] == num_ranks * (TIGHT["device_slots"] - 1)
    assert counted["native_blocks_total"] == planned_native_blocks(tmp_path, num_ranks), (
        "the scheduler counts them, once"
    )


def planned_native_blocks(model: Path, num_ranks: int) -> int:
    """Blocks of windows and states that a plan gives each rank of a server of these sizes, the null block aside."""
    sizes = model_sizes(read_model_fields(str(model)), "float32").of_rank(num_ranks)
    # One step at a time on a CPU
    in_flight, longest = ENGINE["max_num_batched_tokens"], ENGINE["max_model_len"]
    pool = native_pool(sizes.native_kinds(BLOCK_SIZE, num_ranks), sizes.num_layers, in_flight, longest)
    return pool.num_bytes(ENGINE["max_num_seqs"], ENGINE["kv_cache_memory_bytes"]) // pool.block_bytes - 1


@pytest.mark.skipif(not IS_THOROUGH, reason="FLASHMEMORY_HYBRIDS is not thorough: minutes in Triton's interpreter")
def test_texts_are_vllms_with_its_newer_model_runner(tmp_path: Path) -> None:
    """Of prompts whose blocks do not all have slots at once, and of one that is asked again."""
    first = random_prompts(4, 70, 130)
    stock = EngineRun(save_tiny_gemma3(tmp_path), [first, first[:2]], 40, engine=ENGINE, runner="v2")
    theirs, ours = run_engine(stock, 1200), run_engine(replace(stock, flashmemory=TIGHT), 1200)
    assert ours.tokens == theirs.tokens
    assert min(len(set(text)) for texts in ours.tokens for text in texts) > 5, "texts that say little show little"
    assert ours.counters["slots_total"] < ours.counters["host_blocks_total"]
    assert ours.counters["evictions_total"] > 0
    assert ours.metrics["prefix_cache_hits"] >= theirs.metrics["prefix_cache_hits"] > 0
    assert ours.model_runner == theirs.model_runner == V2_RUNNER


@pytest.mark.skipif(not IS_THOROUGH, reason="FLASHMEMORY_HYBRIDS is not thorough")
def test_texts_beside_delta_nets_are_vllms_at_equal_batches(tmp_path: Path) -> None:
    """On a CPU they are in bf16 alone, where vLLM's texts depend on how prompts are cut.

    So without a preemption, and without prefix caching, for which vLLM cuts prompts where a hit may end.
    """
    rounds = [random_prompts(4, 70, 130, seed=seed) for seed in range(4)]
    engine = ENGINE | {"dtype": "bfloat16", "enable_prefix_caching": False}
    stock = EngineRun(save_tiny_qwen3_next(tmp_path), rounds, 40, engine=engine)
    theirs, ours = run_engine(stock), run_engine(replace(stock, flashmemory=TIGHT | {"device_slots": 48}))
    assert ours.tokens == theirs.tokens
    assert min(len(set(text)) for texts in ours.tokens for text in texts) > 20, "texts that say little show little"
    assert ours.counters["slots_total"] < ours.counters["host_blocks_total"]
    assert ours.counters["evictions_total"] > 0
    assert ours.metrics["preemptions"] == ours.metrics["prefix_cache_hits"] == 0


def test_sparse_attention_with_sinks_is_the_oracles(tmp_path: Path) -> None:
    """Over chosen blocks and over streamed history, with NaN wherever nothing lies."""
    options = {
        "resident_ratio": 0.3,
        "min_sparse_tokens": 0,
        "sink_tokens": BLOCK_SIZE,
        "recent_tokens": 2 * BLOCK_SIZE,
        "selector": "exact",
        "tau_steps": 8,
        "growth_reserve_tokens": 0,
        "staging_blocks": 3,
        "host_memory_gib": 0.25,
        "device_slots": 27,
        "check_integrity": True,
        "poison_free_slots": True,
    }
    engine = {
        "dtype": "float32",
        "block_size": BLOCK_SIZE,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
        "kv_cache_memory_bytes": 1 << 28,
    }
    first = random_prompts(5, 250, 400)
    rounds = [first, first[:2]]
    result = run_engine(
        EngineRun(save_tiny_gpt_oss(tmp_path), rounds, 60, flashmemory=options, engine=engine, oracle=True)
    )
    for kind, checked in result.checked.items():
        assert checked.max_error < TOLERANCE, kind
    assert result.checked["sparse_decode"].rows >= 300
    assert result.checked["streamed_prefill"].rows > 0
    counted = result.counters
    assert counted["decode_resident_blocks_total"] < 0.5 * counted["decode_context_blocks_total"]
    assert counted["evictions_total"] > 0
    assert counted["missing_selections_total"] == 0
    assert result.metrics["prefix_cache_hits"] > 0
