"""At a resident ratio of 1 our backend writes token for token what vLLM's own writes, while blocks come and go.

Greedy and in fp32, where the batch that a token is computed in does not show. The device has fewer slots than the
running requests come to need, so blocks are evicted and recalled and requests preempted; the host has room for every
prompt, so a later round finds those of an earlier one in the prefix cache.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.helpers.engine import V1_RUNNER, V2_RUNNER, EngineResult, EngineRun, run_engine
from tests.helpers.tiny_model import random_prompts, save_tiny_llama

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's CUDA build has no CPU backend"),
]

BLOCK_SIZE = 32

Models = Callable[..., Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Folders of models, by their sizes."""

    @cache
    def model(num_layers: int = 4, num_kv_heads: int = 2) -> Path:
        folder = tmp_path_factory.mktemp("model")
        return save_tiny_llama(folder, num_layers=num_layers, num_kv_heads=num_kv_heads)

    return model


def _stock_run(model: Path, rounds: list[list[list[int]]], max_tokens: int, max_model_len: int) -> EngineRun:
    """What to ask an engine with vLLM's own backend, which has memory for all."""
    engine = {
        "dtype": "float32",
        "block_size": BLOCK_SIZE,
        "max_model_len": max_model_len,
        "max_num_seqs": len(rounds[0]),
        "max_num_batched_tokens": max_model_len // 2,
        "kv_cache_memory_bytes": 1 << 28,
    }
    return EngineRun(model, rounds, max_tokens, engine=engine)


def _with_slots(stock: EngineRun, num_slots: int) -> EngineRun:
    """The same, for an engine with our backend."""
    ours = {
        "resident_ratio": 1.0,
        "device_slots": num_slots,
        "growth_reserve_tokens": 0,
        "host_memory_gib": 0.25,
        "check_integrity": True,
    }
    return replace(stock, flashmemory=ours)


def _short_run(model: Path) -> EngineRun:
    """Four prompts of 40 tokens; two of the second round's are the first's."""
    first = random_prompts(4, 70, 130)
    return _stock_run(model, [first, [*random_prompts(2, 70, 130, seed=1), *first[:2]]], 40, max_model_len=512)


SHORT_SLOTS = 19


def _check_same_text(ours: EngineResult, stock: EngineResult) -> None:
    """Every token is the same, and everything that could have changed one has happened."""
    assert ours.tokens == stock.tokens
    counted = ours.counters
    assert counted["slots_total"] < counted["host_blocks_total"]
    assert counted["evictions_total"] > 0
    assert counted["recalled_blocks_total"] > 0
    assert counted["decode_resident_blocks_total"] == counted["decode_context_blocks_total"]
    assert ours.metrics["prefix_cache_hits"] > 0
    assert ours.metrics["preemptions"] > 0
    assert stock.metrics["preemptions"] == 0
    assert ours.model_runner == stock.model_runner
    assert ours.scheduler == stock.scheduler
    assert ours.compilation == stock.compilation


def test_sixteen_prompts_of_200_tokens(models: Models) -> None:
    first, second = (random_prompts(16, 100, 300, seed) for seed in range(2))
    rounds = [first, [*second[:8], *first[:8]], first]
    stock = _stock_run(models(), rounds, 200, max_model_len=1024)
    theirs, ours = run_engine(stock), run_engine(_with_slots(stock, 150))
    _check_same_text(ours, theirs)
    assert [len(text) for text in ours.tokens[0]] == [200] * 16
    assert ours.model_runner == V1_RUNNER


@pytest.mark.parametrize("num_kv_heads", [8, 1], ids=["multi-head", "multi-query"])
def test_other_numbers_of_kv_heads(models: Models, num_kv_heads: int) -> None:
    stock = _short_run(models(num_kv_heads=num_kv_heads))
    _check_same_text(run_engine(_with_slots(stock, SHORT_SLOTS)), run_engine(stock))


def test_compiled_layers(models: Models) -> None:
    eager = _short_run(models(num_layers=2))
    stock = replace(eager, engine={**eager.engine, "enforce_eager": False})
    theirs, ours = run_engine(stock), run_engine(_with_slots(stock, SHORT_SLOTS))
    _check_same_text(ours, theirs)
    assert ours.compilation == "DYNAMO_TRACE_ONCE"


@pytest.mark.parametrize(
    ("is_async", "scheduler", "max_batches"),
    [(False, "Scheduler", 1), (True, "AsyncScheduler", 2)],
    ids=["sync", "async"],
)
def test_model_runner_v2(models: Models, is_async: bool, scheduler: str, max_batches: int) -> None:
    stock = replace(_short_run(models(num_layers=2)), runner="v2", async_scheduling=is_async)
    theirs, ours = run_engine(stock), run_engine(_with_slots(stock, SHORT_SLOTS))
    _check_same_text(ours, theirs)
    assert ours.model_runner == V2_RUNNER
    assert (ours.scheduler, ours.max_batches) == (scheduler, max_batches)


def test_two_tensor_parallel_ranks(models: Models) -> None:
    """Each rank has slots, a host pool and resident sets of its own, for its own heads; gauges and counters add up."""
    one = _short_run(models())
    stock = replace(one, engine={**one.engine, "tensor_parallel_size": 2})
    theirs, ours = run_engine(stock), run_engine(_with_slots(stock, SHORT_SLOTS))
    _check_same_text(ours, theirs)
    assert ours.counters["slots_total"] == 2 * (SHORT_SLOTS - 1)
