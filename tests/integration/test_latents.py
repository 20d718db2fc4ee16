"""A model with latent attention (DeepSeek-V3: dense layers and experts) on vLLM's backends for CPUs.

With a resident ratio of 1 every text is vLLM's, while blocks come and go and requests are preempted; below it, what
rows attend to is what the oracle says, and first tokens are vLLM's: prefill is dense. Chunks of prompts end where a
block ends, before and after.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flashmemory_vllm.cli.plan import model_sizes, read_model_fields
from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.runtime.capacity import CapacityPlan
from flashmemory_vllm.runtime.forecast import ServerSizes, forecast
from tests.helpers.engine import V1_RUNNER, EngineResult, EngineRun, run_engine
from tests.helpers.tiny_model import random_prompts, save_tiny_deepseek_v3

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's CUDA build has no CPU backend"),
]

BLOCK_SIZE = 16
TOLERANCE = 1e-5
# Of rounding to eight bits, of what is multiplied and of the weights of a softmax
TOLERANCE_BF16 = 2e-2
# Three are asked again, and are hits: two but for one token, which is computed as decode rows are, one but for six
FIRST = [random_prompts(1, length, length, seed=length + 1)[0] for length in (193, 209, 160, 230)]
ROUNDS = [FIRST, [*FIRST[:2], FIRST[3], *random_prompts(1, 100, 250, seed=1)]]
ENGINE: dict[str, Any] = {
    # For stock vLLM: where the CPU has AMX it would take another one, which knows no fp32
    "attention_backend": "CPU_MLA",
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 4,
    # No multiple of a block, and more than one
    "max_num_batched_tokens": 72,
    "kv_cache_memory_bytes": 1 << 28,
}
OURS = {"growth_reserve_tokens": 0, "host_memory_gib": 0.25, "check_integrity": True, "poison_free_slots": True}
# Less host memory than four requests of any length have blocks for: its bytes decide
WHOLE = OURS | {"resident_ratio": 1.0, "device_slots": 40, "host_memory_gib": 0.0165}
SPARSE = OURS | {
    "resident_ratio": 0.3,
    "min_sparse_tokens": 0,
    "sink_tokens": BLOCK_SIZE,
    "recent_tokens": 2 * BLOCK_SIZE,
    "selector": "exact",
    "tau_steps": 8,
    "staging_blocks": 3,
    "layer_groups": 2,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> EngineRun:
    """The stock engine."""
    return EngineRun(save_tiny_deepseek_v3(tmp_path_factory.mktemp("model")), ROUNDS, 60, engine=ENGINE)


@pytest.fixture(scope="module")
def stock(run: EngineRun) -> EngineResult:
    """What it says."""
    return run_engine(run)


def test_texts_are_vllms(run: EngineRun, stock: EngineResult) -> None:
    """All blocks, but too few slots for those of all requests."""
    ours = run_engine(replace(run, flashmemory=WHOLE))
    assert ours.tokens == stock.tokens
    assert min(len(set(text)) for texts in ours.tokens for text in texts) >= 20, "texts that say little show little"
    counted = ours.counters
    assert counted["slots_total"] < counted["host_blocks_total"]
    made = planned(run.model)
    # The null ones are nobody's
    assert (counted["slots_total"], counted["host_blocks_total"]) == (made.num_slots - 1, made.num_logical_blocks - 1)
    assert counted["recalled_bytes_total"] == counted["recalled_blocks_total"] * made.block_bytes
    assert counted["evictions_total"] > 0
    assert counted["recalled_blocks_total"] > 0
    assert counted["decode_resident_blocks_total"] == counted["decode_context_blocks_total"]
    assert ours.metrics["preemptions"] > 0
    # VLLM switches prefix caching off for latents on a CPU
    assert ours.metrics["prefix_cache_hits"] > stock.metrics["prefix_cache_hits"] == 0
    assert ours.model_runner == stock.model_runner == V1_RUNNER


def planned(model: Path) -> CapacityPlan:
    """What a plan gives a server of these sizes."""
    config = FlashMemoryConfig.from_additional_config({"flashmemory": WHOLE})
    server = ServerSizes(
        device_bytes=ENGINE["kv_cache_memory_bytes"],
        context_tokens=ENGINE["max_model_len"],
        max_num_seqs=ENGINE["max_num_seqs"],
        max_num_batched_tokens=ENGINE["max_num_batched_tokens"],
        block_size=BLOCK_SIZE,
    )
    return forecast(model_sizes(read_model_fields(str(model)), "float32"), config, server).capacity


def _check(result: EngineResult, tolerance: float, most_resident: float) -> None:
    """Every output was right, and every way to get one wrong was tried, with such a share of blocks at most."""
    for kind, checked in result.checked.items():
        assert checked.max_error < tolerance, kind
    assert result.checked["sparse_decode"].rows >= 300
    assert result.checked["streamed_prefill"].rows > 0
    counted = result.counters
    assert counted["decode_resident_blocks_total"] < most_resident * counted["decode_context_blocks_total"]
    assert counted["streamed_blocks_total"] > 0
    assert counted["evictions_total"] > 0
    assert counted["missing_selections_total"] == 0
    assert result.metrics["prefix_cache_hits"] > 0


def test_sparse_attention_is_the_oracles(run: EngineRun, stock: EngineResult) -> None:
    """Over chosen blocks of latents and over streamed history, with NaN wherever nothing lies."""
    result = run_engine(replace(run, flashmemory=SPARSE | {"device_slots": 24}, oracle=True))
    _check(result, TOLERANCE, 0.5)
    for ours, theirs in zip(result.tokens, stock.tokens, strict=True):
        assert [text[0] for text in ours] == [text[0] for text in theirs]


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="the CPU has no AMX")
def test_sparse_attention_on_amx_tiles_is_the_oracles(run: EngineRun) -> None:
    """In bf16, the one dtype of vLLM's faster backend. Its blocks are twice as large: fewer of them can be left out."""
    options = SPARSE | {"device_slots": 16, "recent_tokens": 64}
    result = run_engine(replace(run, flashmemory=options, engine=ENGINE | {"dtype": "bfloat16"}, oracle=True))
    _check(result, TOLERANCE_BF16, 0.75)
