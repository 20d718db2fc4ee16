"""Runs one vLLM engine in a process of its own and returns what it generated and counted.

A process each, because backends, overrides and CUDA graphs are process-wide state: two engines that are compared
must not share it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from tests.helpers.entry_points import entry_point_folder
from tests.helpers.modules import ROOT, TIMEOUT_SECONDS, run_module
from tests.helpers.oracle import Checked, Kind

# vLLM and its libraries print to standard output too, even after the result.
RESULT_MARK = "engine result: "
# vLLM's model runners on a CPU, as `EngineResult.model_runner` names them.
V1_RUNNER = "vllm.v1.worker.cpu_model_runner.CPUModelRunner"
V2_RUNNER = "vllm.v1.worker.cpu.model_runner.CPUModelRunner"
TRITON_CPU = ROOT / "tests" / "tools" / "triton_cpu"


@dataclass(frozen=True, slots=True)
class EngineRun:
    """One engine and what to ask it.

    Attributes:
        model: folder of the model.
        rounds: each a list of prompts (token ids) that are generated together.
        max_tokens: tokens to generate for each prompt.
        flashmemory: our options, or None for the stock backend.
        engine: further arguments of `vllm.LLM`.
        runner: "v1" or "v2" (through Triton's interpreter on a CPU).
        async_scheduling: schedule a step before the one before it has returned, which vLLM does not do on a CPU.
        oracle: compare every attention output with `tests.helpers.oracle`.
        reset_prefix_cache: forget all prefixes before each round.
        env: further environment variables.
    """

    model: Path
    rounds: Sequence[Sequence[Sequence[int]]]
    max_tokens: int
    flashmemory: Mapping[str, Any] | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    runner: Literal["v1", "v2"] = "v1"
    async_scheduling: bool = False
    oracle: bool = False
    reset_prefix_cache: bool = False
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineResult:
    """What an engine returned.

    Attributes:
        tokens: generated ids by round and prompt.
        counters: our counters after the last round, empty for the stock backend.
        metrics: vLLM's own counters: preemptions, prefix_cache_hits.
        model_runner: class of the model runner, with its module.
        scheduler: class of the scheduler.
        max_batches: batches that may be under way at once.
        compilation: vLLM's compilation mode.
        checked: what the oracle compared, by kind of row; empty without one.
    """

    tokens: list[list[list[int]]]
    counters: dict[str, float]
    metrics: dict[str, float]
    model_runner: str
    scheduler: str
    max_batches: int
    compilation: str
    checked: dict[Kind, Checked]


def run_engine(run: EngineRun, timeout_s: float = TIMEOUT_SECONDS) -> EngineResult:
    """Start the engine, generate, stop it.

    Raises:
        AssertionError: the engine's process failed; the message ends with its output.
    """
    last = run_main("tests.helpers.engine_main", run, timeout_s)
    last["checked"] = {kind: Checked(**checked) for kind, checked in last["checked"].items()}
    return EngineResult(**last)


def run_main(module: str, run: EngineRun, timeout_s: float = TIMEOUT_SECONDS) -> dict[str, Any]:
    """Run a module that reads a run as JSON and prints one marked line of JSON, in a process of its own.

    Raises:
        AssertionError: the process failed; the message ends with its output.
    """
    printed = run_module(module, engine_environment(run), stdin=json.dumps(_request(run)), timeout_s=timeout_s)
    marked = [line for line in printed.splitlines() if line.startswith(RESULT_MARK)]
    assert marked, f"the engine printed no result:\n{printed[-4000:]}"
    last: dict[str, Any] = json.loads(marked[-1].removeprefix(RESULT_MARK))
    return last


def _request(run: EngineRun) -> dict[str, Any]:
    engine: dict[str, Any] = {
        "model": str(run.model),
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "disable_log_stats": False,
        **run.engine,
    }
    if run.flashmemory is not None:
        engine["attention_backend"] = "flashmemory"
        engine["additional_config"] = {"flashmemory": dict(run.flashmemory)}
    return {
        "engine": engine,
        "rounds": run.rounds,
        "max_tokens": run.max_tokens,
        "ours": run.flashmemory is not None,
        "async_scheduling": run.async_scheduling,
        "oracle": run.oracle,
        "reset_prefix_cache": run.reset_prefix_cache,
    }


def engine_environment(run: EngineRun) -> dict[str, str]:
    """Variables of the process that runs an engine."""
    paths = [str(entry_point_folder()), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = dict(os.environ) | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        # Threads that wait for each other spin: on cores shared with anything else, a tiny model is many times
        # faster with one
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    if torch.cuda.is_available():
        env["VLLM_USE_V2_MODEL_RUNNER"] = "1" if run.runner == "v2" else "0"
    elif run.runner == "v2":
        paths.insert(0, str(TRITON_CPU))
        env["TRITON_INTERPRET"] = "1"
    env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return env | dict(run.env)
