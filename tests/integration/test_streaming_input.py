"""Streaming-input sessions on real vLLM: each turn is answered as the whole prompt would be, others beside it too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.engine import EngineRun, engine_environment
from tests.helpers.modules import ROOT
from tests.helpers.tiny_model import save_tiny_llama

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's CUDA build has no CPU backend"),
]


def test_a_session_answers_as_its_whole_prompts(tmp_path: Path) -> None:
    engine = {
        "model": str(save_tiny_llama(tmp_path / "model")),
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "float32",
        "block_size": 32,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
        "kv_cache_memory_bytes": 1 << 28,
        "attention_backend": "flashmemory",
        "additional_config": {
            "flashmemory": {
                "resident_ratio": 1.0,
                "device_slots": 40,
                "host_memory_gib": 0.25,
                "check_integrity": True,
            }
        },
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.streaming_main"],
        input=json.dumps(engine),
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        cwd=ROOT,
        env=engine_environment(EngineRun(ROOT, [], 1, env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})),
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    mark = "streamed: "
    result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith(mark)).removeprefix(mark))
    assert result["streamed"] == result["expected"]
