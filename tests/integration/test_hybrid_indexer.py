"""An indexer for a model with windows beside full attention: recorded from layers of full attention alone, and served.

FLASHMEMORY_HYBRIDS=thorough trains and serves one on what was recorded.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from tests.helpers.engine import EngineRun, engine_environment, run_engine
from tests.helpers.modules import run_module
from tests.helpers.tiny_model import random_prompts, save_tiny_gemma3

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's CUDA build has no CPU backend"),
]

BLOCK_SIZE, OUTPUTS, TOLERANCE = 32, 24, 1e-5
IS_THOROUGH = os.environ.get("FLASHMEMORY_HYBRIDS") == "thorough"
ENGINE = {
    "dtype": "float32",
    "block_size": BLOCK_SIZE,
    "max_model_len": 1024,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 1 << 28,
}


def command(*words: object) -> None:
    """Run our command in a process of its own."""
    run_module("flashmemory_vllm.cli.app", engine_environment(EngineRun(Path(), [], 1)), list(map(str, words)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 5, 11 and 17 attend to all tokens; the tokenizer is never asked."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = save_tiny_gemma3(tmp_path_factory.mktemp("gemma3"), num_layers=18)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recording(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished capture."""
    folder = tmp_path_factory.mktemp("recording")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt_ids": ids}) for ids in random_prompts(6, 500, 700)))
    asked = ("--prompts", prompts, "--max-output-tokens", OUTPUTS, "--anchor-layers", 5, 17, "--batch", 4)
    sizes = ("--block-size", BLOCK_SIZE, "--dtype", "float32", "--gpu-memory-bytes", 1 << 28)
    command("capture", "--model", model, "--out", folder / "out", *asked, *sizes, "--host-memory-gib", 0.3)
    return folder / "out"


def test_layers_with_windows_are_not_recorded(recording: Path) -> None:
    meta = json.loads((recording / "meta.json").read_text())
    assert (meta["num_layers"], meta["layer_indices"], meta["anchor_layers"]) == (3, [5, 11, 17], [0, 2])
    documents = load_file(recording / "shard-00000.safetensors")
    keys = {name: value for name, value in documents.items() if name.endswith(".keys")}
    assert len(keys) == 6
    assert all(len(value) == 2 for value in keys.values())


@pytest.mark.skipif(not IS_THOROUGH, reason="FLASHMEMORY_HYBRIDS is not thorough")
def test_an_indexer_that_was_trained_on_it_serves(model: Path, recording: Path, tmp_path: Path) -> None:
    """What decode attends to is what it chose, over all of which the oracle knows."""
    indexer = tmp_path / "indexer.safetensors"
    command("train", "--data", recording, "--out", indexer, "--epochs", 2, "--dim", 32)
    options = {
        "indexer": str(indexer),
        "resident_ratio": 0.3,
        "min_sparse_tokens": 0,
        "sink_tokens": BLOCK_SIZE,
        "recent_tokens": 2 * BLOCK_SIZE,
        "host_memory_gib": 0.3,
        "check_integrity": True,
    }
    rounds = [random_prompts(4, 600, 900, seed=1)]
    result = run_engine(EngineRun(model, rounds, 40, flashmemory=options, engine=ENGINE, oracle=True))
    assert result.checked["sparse_decode"].rows > 100
    assert all(checked.max_error < TOLERANCE for checked in result.checked.values())
    assert result.counters["selections_total"] > 10
