"""`vllm.LLM` with the shipped indexer, started as vLLM starts it: the engine core is a fork of the user's process.

On a CPU vLLM spawns it; what makes a fork hang there is tested in `tests/integration/test_fork.py`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flashmemory_vllm.reference import reference_indexer_path, reference_model_path
from tests.helpers.engine import EngineRun, engine_environment

ROOT = Path(__file__).parents[2]
HANGS_AFTER_SECONDS = 500
# With one thread, spawned or in one process nothing hangs: vLLM's own choice and several threads are what a user has
LEFT_TO_VLLM = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_WORKER_MULTIPROC_METHOD", "OMP_NUM_THREADS")


@pytest.mark.e2e
@pytest.mark.slow
def test_a_trained_indexer_starts_in_a_forked_engine() -> None:
    model = reference_model_path()
    environment = engine_environment(EngineRun(model, [], 0))
    arguments = {
        "model": str(model),
        "attention_backend": "flashmemory",
        "additional_config": {"flashmemory": {"indexer": str(reference_indexer_path()), "host_memory_gib": 1.0}},
        "dtype": "bfloat16",
        "block_size": 32,
        "max_model_len": 4096,
        "kv_cache_memory_bytes": 1 << 28,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.start_main"],
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER_SECONDS,
        check=False,
        cwd=ROOT,
        env={name: value for name, value in environment.items() if name not in LEFT_TO_VLLM} | {"OMP_NUM_THREADS": "4"},
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
    found = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    assert (len(found["tokens"]), found["start"]) == (4, "fork")
