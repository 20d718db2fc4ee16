"""One engine serves one selector after the other: what evaluation does between its settings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.engine import EngineRun, engine_environment
from tests.helpers.indexers import save_untrained, spoil
from tests.helpers.tiny_model import random_prompts, save_tiny_llama

SCRIPT = """
import json, sys
from flashmemory_vllm.plugin.offline import OfflineGenerator

model, prompt, damaged = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
engine = {"block_size": 32, "max_model_len": 1024, "max_num_seqs": 2, "enforce_eager": True, "dtype": "float32"}
start = {"selector": "exact", "resident_ratio": 1.0, "min_sparse_tokens": 0, "host_memory_gib": 0.25}
start |= {"sink_tokens": 32, "recent_tokens": 64, "growth_reserve_tokens": 0}
with OfflineGenerator(model, engine | {"kv_cache_memory_bytes": 1 << 27}, start) as generator:
    texts = [generator.generate([prompt], 12)]
    try:
        generator.reconfigure({"selector": "neural", "indexer": damaged})
    except Exception as error:
        not_built = str(error)
    texts.append(generator.generate([prompt], 12))
    for options in ({"selector": "streaming", "resident_ratio": 0.2}, {"selector": "full", "resident_ratio": 1.0}):
        generator.reconfigure(options)
        texts.append(generator.generate([prompt], 12))
    counters = generator.counters()
    try:
        generator.reconfigure({"min_sparse_tokens": 5})
    except Exception as error:
        refused = str(error)
print("\\nresult: " + json.dumps([texts, counters["decode_resident_blocks_total"], refused, not_built]), flush=True)
"""


@pytest.mark.e2e
@pytest.mark.slow
def test_a_smaller_ratio_and_back_and_a_damaged_indexer_between(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model")
    damaged = save_untrained(tmp_path / "damaged.safetensors", num_layers=4, num_query_heads=8, head_dim=32)
    spoil(damaged)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            SCRIPT,
            str(tmp_path / "model"),
            json.dumps(random_prompts(1, 600, 600)[0]),
            str(damaged),
        ],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        env=engine_environment(EngineRun(tmp_path, [], 1)),
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    line = next(line for line in done.stdout.splitlines() if line.startswith("result: "))
    texts, resident_blocks, refused, not_built = json.loads(line.removeprefix("result: "))
    dense, after_the_error, sparse, dense_again = texts
    assert "NaN or infinite" in not_built
    assert dense == after_the_error == dense_again
    assert len(sparse[0]) == 12
    # Each text decodes 8 times with 19 blocks and 3 times with 20, or with a fifth of them, rounded down
    assert resident_blocks == 3 * (8 * 19 + 3 * 20) + 8 * 3 + 3 * 4
    assert "min_sparse_tokens" in refused
