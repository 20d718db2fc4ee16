"""One engine serves one selector after the other: what evaluation does between its settings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.engine import EngineRun, engine_environment
from tests.helpers.tiny_model import random_prompts, save_tiny_llama

SCRIPT = """
import json, sys
from flashmemory_vllm.plugin.offline import OfflineGenerator

model, prompt = sys.argv[1], json.loads(sys.argv[2])
engine = {"block_size": 32, "max_model_len": 1024, "max_num_seqs": 2, "enforce_eager": True, "dtype": "float32"}
start = {"selector": "exact", "resident_ratio": 1.0, "min_sparse_tokens": 0, "host_memory_gib": 0.25}
start |= {"sink_tokens": 32, "recent_tokens": 64, "growth_reserve_tokens": 0}
with OfflineGenerator(model, engine | {"kv_cache_memory_bytes": 1 << 27}, start) as generator:
    texts = [generator.generate([prompt], 12)]
    for options in ({"selector": "streaming", "resident_ratio": 0.2}, {"selector": "full", "resident_ratio": 1.0}):
        generator.reconfigure(options)
        texts.append(generator.generate([prompt], 12))
    counters = generator.counters()
    try:
        generator.reconfigure({"min_sparse_tokens": 5})
    except Exception as error:
        refused = str(error)
print("\\nresult: " + json.dumps([texts, counters["decode_resident_blocks_total"], refused]), flush=True)
"""


@pytest.mark.e2e
@pytest.mark.slow
def test_a_smaller_ratio_and_back(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), json.dumps(random_prompts(1, 600, 600)[0])],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=engine_environment(EngineRun(tmp_path, [], 1)),
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    line = next(line for line in done.stdout.splitlines() if line.startswith("result: "))
    (dense, sparse, dense_again), resident_blocks, refused = json.loads(line.removeprefix("result: "))
    assert dense == dense_again
    assert len(sparse[0]) == 12
    # Each text decodes 8 times with 19 blocks and 3 times with 20, or with a fifth of them, rounded down
    assert resident_blocks == 2 * (8 * 19 + 3 * 20) + 8 * 3 + 3 * 4
    assert "min_sparse_tokens" in refused
