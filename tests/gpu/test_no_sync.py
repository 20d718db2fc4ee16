"""A decode step never makes the host wait for the device, not even when sets change and blocks come and go."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.engine import EngineRun, engine_environment
from tests.helpers.tiny_model import save_tiny_llama

# Runs in a process of its own, with the worker in it: the debug mode is a state of the process.
SCRIPT = """
import json, sys
import torch
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

llm = LLM(**json.loads(sys.argv[1]))
engine = llm.llm_engine
sampling = SamplingParams(temperature=0.0, max_tokens=160, ignore_eos=True, detokenize=False)
for index in range(4):
    prompt = [(7 * index + 3 * place) % 500 + 2 for place in range(700 + 32 * index)]
    engine.add_request(str(index), TokensPrompt(prompt_token_ids=prompt), sampling)
for _ in range(40):  # prefill, the first selections, and the kernels compiled
    engine.step()
torch.cuda.set_sync_debug_mode("error")
try:
    torch.ones(1, device="cuda").item()
except RuntimeError:
    print("armed", flush=True)
for _ in range(80):
    engine.step()
torch.cuda.set_sync_debug_mode("default")
from flashmemory_vllm.observability.counters import CounterReader
from flashmemory_vllm.plugin.counter_files import engine_counters_directory
counters = CounterReader(engine_counters_directory(engine.vllm_config)).read()
print("counters", json.dumps(counters), flush=True)
"""


@pytest.mark.e2e
@pytest.mark.slow
def test_steady_decode_steps_do_not_synchronise(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    engine = {
        "model": str(tmp_path),
        "skip_tokenizer_init": True,
        "attention_backend": "flashmemory",
        "max_model_len": 1024,
        "max_num_seqs": 4,
        "block_size": 32,
        "gpu_memory_utilization": 0.2,
        "kv_cache_memory_bytes": 1 << 26,
        "disable_log_stats": False,
        "async_scheduling": False,
        "additional_config": {
            "flashmemory": {
                "selector": "exact",
                "resident_ratio": 0.3,
                "min_sparse_tokens": 256,
                "recent_tokens": 64,
                "tau_steps": 8,
                "device_slots": 60,
                "growth_reserve_tokens": 0,
                "host_memory_gib": 0.25,
            }
        },
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(engine)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env=engine_environment(EngineRun(tmp_path, [], 1)),
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    lines = done.stdout.splitlines()
    assert "armed" in lines
    counters = json.loads(next(line for line in lines if line.startswith("counters ")).removeprefix("counters "))
    assert counters["selections_total"] > 4
    assert counters["recalled_blocks_total"] > 0
    assert counters["written_back_blocks_total"] > 0
