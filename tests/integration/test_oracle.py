"""Attention over resident blocks, streamed history included, against an oracle over the logical KV.

The engines run sparse, in fp32, with fewer slots than their requests come to need: sets change while copies land,
history is streamed to prefill, requests are preempted and resumed. The tolerance is ten times the error of fp32
attention over a few hundred tokens.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.engine import V1_RUNNER, V2_RUNNER, EngineResult, EngineRun, run_engine
from tests.helpers.tiny_model import random_prompts, save_tiny_llama

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's CUDA build has no CPU backend"),
]

TOLERANCE = 1e-5
BLOCK_SIZE = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model."""
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def _sparse_run(model: Path, rounds: list[list[list[int]]], max_tokens: int, **options: Any) -> EngineRun:
    """An engine under the oracle; `options` are ours, beside those that make requests of this size sparse."""
    ours = {
        "resident_ratio": 0.4,
        "min_sparse_tokens": 0,
        "sink_tokens": BLOCK_SIZE,
        "recent_tokens": 2 * BLOCK_SIZE,
        # Of all, the one whose sets change most, where it remembers nothing
        "selector": "exact",
        "memory_decay": 0.0,
        "successor_share": 0.0,
        "hysteresis": 0.0,
        "tau_steps": 8,
        "growth_reserve_tokens": 0,
        "staging_blocks": 3,
        "host_memory_gib": 0.25,
        "check_integrity": True,
        **options,
    }
    engine = {
        "dtype": "float32",
        "block_size": BLOCK_SIZE,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
        "kv_cache_memory_bytes": 1 << 28,
    }
    return EngineRun(model, rounds, max_tokens, flashmemory=ours, engine=engine, oracle=True)


def _long_run(model: Path, **options: Any) -> EngineRun:
    """Two rounds of eight prompts; half of the second round's are the first's."""
    first = random_prompts(8, 300, 500)
    second = [*random_prompts(4, 300, 500, seed=1), *first[:4]]
    return _sparse_run(model, [first, second], 120, device_slots=34, **options)


def _check_errors(result: EngineResult) -> None:
    for kind, checked in result.checked.items():
        assert checked.max_error < TOLERANCE, kind


def _check(result: EngineResult, sparse_rows: int) -> None:
    """Every output was right, and every way to get one wrong was tried."""
    _check_errors(result)
    assert result.checked["sparse_decode"].rows >= sparse_rows
    assert result.checked["streamed_prefill"].rows > 0
    counted = result.counters
    assert counted["decode_resident_blocks_total"] < 0.5 * counted["decode_context_blocks_total"]
    assert counted["evictions_total"] > 0
    assert counted["streamed_blocks_total"] > 0
    # Some are waited for, others land while the set before is in force
    assert counted["recalled_blocks_total"] > counted["prefetched_blocks_total"] > 0
    assert counted["missing_selections_total"] == 0
    assert result.metrics["prefix_cache_hits"] > 0
    assert result.metrics["preemptions"] > 0


@pytest.fixture(scope="module")
def one_group(model: Path) -> EngineResult:
    """The long run with one resident set for all layers."""
    return run_engine(_long_run(model))


def test_one_layer_group(one_group: EngineResult) -> None:
    _check(one_group, sparse_rows=1000)
    assert one_group.model_runner == V1_RUNNER


def test_two_layer_groups(model: Path) -> None:
    _check(run_engine(_long_run(model, layer_groups=2)), sparse_rows=1000)


def test_poisoned_memory_changes_no_token(model: Path, one_group: EngineResult) -> None:
    """NaN in free slots and in staging reaches no output."""
    poisoned = run_engine(_long_run(model, poison_free_slots=True))
    _check(poisoned, sparse_rows=1000)
    assert poisoned.tokens == one_group.tokens


@pytest.mark.parametrize(("layer_groups", "is_async"), [(1, False), (2, True)], ids=["sync", "async"])
def test_model_runner_v2(model: Path, layer_groups: int, is_async: bool) -> None:
    first = random_prompts(5, 250, 400)
    run = _sparse_run(model, [first, first[:2]], 60, device_slots=27, layer_groups=layer_groups)
    result = run_engine(replace(run, runner="v2", async_scheduling=is_async))
    _check(result, sparse_rows=400)
    assert result.model_runner == V2_RUNNER
    assert result.scheduler == ("AsyncScheduler" if is_async else "Scheduler")


def test_dense_fallbacks(model: Path) -> None:
    """Requests keep all their blocks while there is room, and lose them again."""
    prompts = random_prompts(8, 300, 500)
    rounds = [prompts[:2], prompts]
    options = {"score_threshold": 0.005, "dense_fallback_share": 0.3, "tau_steps": 16}
    result = run_engine(_sparse_run(model, rounds, 100, device_slots=60, **options))
    _check_errors(result)
    counted = result.counters
    assert counted['dense_fallbacks_total{reason="score_share"}'] >= 2
    assert counted["revoked_dense_fallbacks_total"] > 0
    assert counted["refused_dense_fallbacks_total"] > 0
    assert result.checked["sparse_decode"].rows > 0


def test_prompt_that_another_request_computes_in_the_same_step(model: Path) -> None:
    """The second of two equal prompts hits blocks that are not written yet, and continues as the prompt alone does."""
    # The last chunk of each fills a block and leaves tokens of its step to the other request
    prompts = [random_prompts(1, length, length, seed=length)[0] for length in (560, 600, 690)]
    rounds = [requests for prompt in prompts for requests in ([prompt], [prompt, prompt])]
    # One selection for each request: when the next one comes depends on what else runs
    run = _sparse_run(model, rounds, 40, resident_ratio=0.25, device_slots=13, tau_steps=128)
    result = run_engine(replace(run, reset_prefix_cache=True))
    for alone, pair in zip(result.tokens[::2], result.tokens[1::2], strict=True):
        assert pair == alone * 2
    _check_errors(result)
    assert result.checked["same_step_prefill"].rows >= len(prompts)
    assert result.checked["streamed_prefill"].rows > 0
