"""Making a configuration leaves a process that can be forked: `vllm.LLM` forks its engine core from it on CUDA.

A child of a process that has started torch's threads hangs in the first thing that it computes on several of them, and
one of a process that has touched the GPU cannot use it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from flashmemory_vllm.indexer import SELECTOR_NAMES
from flashmemory_vllm.reference import reference_indexer_path, reference_model_path

ROOT = Path(__file__).parents[2]
# What a process that computes is found out with needs more threads than one
ENVIRONMENT = dict(os.environ) | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def _what_is_left(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, bool]]:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.fork_main"],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, dict[str, bool]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_selector_leaves_a_process_that_can_be_forked() -> None:
    options: dict[str, dict[str, Any]] = {name: {"selector": name} for name in SELECTOR_NAMES if name != "neural"}
    options["the shipped indexer"] = {"indexer": str(reference_indexer_path())}
    options["fallback"] = {"score_threshold": 0.1, "dense_fallback_share": 0.5}
    arguments = {
        "model": str(reference_model_path()),
        "attention_backend": "flashmemory",
        "max_model_len": 4096,
        "block_size": 32,
        "skip_tokenizer_init": True,
    }
    cases = {
        name: arguments | {"additional_config": {"flashmemory": {"host_memory_gib": 0.5, **given}}}
        for name, given in options.items()
    }
    assert _what_is_left(cases) == {name: {"forks": True, "cuda": False} for name in cases}
