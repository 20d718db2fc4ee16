"""The page that takes a reader's own model to a trained indexer: its commands, run in order on the shipped model."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from flashmemory_vllm.evaluation.eval_rows import load_evaluation
from flashmemory_vllm.evaluation.loss import loss_lines
from flashmemory_vllm.evaluation.tasks import make_samples
from flashmemory_vllm.evaluation.vocabulary import decode
from tests.docs.pages import DOCS, code_blocks
from tests.docs.test_commands import environment, run_in_shell
from tests.unit.deploy.serve import parse_arguments

__all__ = ["environment"]

PAGE = DOCS / "your-model.md"
INSTALL, VALUES, SPLIT, UNTRAINED, TRAIN, TRAINED, SERVE = (
    block.text for block in code_blocks(PAGE) if block.language == "bash"
)
TOKENS, HELD_OUT, TRAINED_ON = 1280, 2, 6
# Small enough for a CPU: all else is the page's. A copy is a model of one's own
LIMITS = "--max-model-len 2048 --max-num-seqs 2 --kv-cache-memory-bytes 50331648"
VALUES_HERE = f"""
MODEL=model
TEXTS=texts.jsonl
TOKENS={TOKENS} DOCUMENTS={TRAINED_ON} HELD_OUT={HELD_OUT}
SERVE="{LIMITS} --block-size 32 --dtype float32 --enforce-eager"
OPTIONS='"min_sparse_tokens": 1024, "host_memory_gib": 0.5'
"""


def names(values: str) -> set[str]:
    """Variables that some lines set."""
    return {word.partition("=")[0] for word in shlex.split(values) if word.partition("=")[0].isupper()}


def write_texts(path: Path) -> None:
    samples = make_samples("multikey", TOKENS + 600, HELD_OUT + TRAINED_ON, seed=11)
    texts = [decode(np.concatenate([sample.prompt_ids, sample.answer_ids])[1:].tolist()) for sample in samples]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_the_page_is_read_as_it_is() -> None:
    assert names(VALUES) == names(VALUES_HERE)
    assert INSTALL.startswith("pip install ")
    _, _, *arguments = shlex.split(SERVE.replace("\\\n", " ").replace("$SERVE", "--max-model-len 34816"))
    arguments[-1] = arguments[-1].replace("{$OPTIONS,", "{")
    parse_arguments(arguments)


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's CUDA build has no CPU backend")
def test_a_model_gets_its_indexer(environment: dict[str, str], tmp_path: Path) -> None:
    write_texts(tmp_path / "texts.jsonl")
    here = f'set -euo pipefail\ncd {tmp_path}\ncp -r "$(flashmemory reference path)" model'
    script = "\n".join((here, VALUES_HERE, SPLIT, UNTRAINED, TRAIN, TRAINED))
    done = run_in_shell(script, environment | {"VLLM_CPU_KVCACHE_SPACE": "1"})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for name, has_indexer in (("untrained", False), ("trained", True)):
        evaluation = load_evaluation(tmp_path / name)
        assert evaluation is not None
        (line,) = loss_lines(evaluation)
        assert (line.documents, line.is_sparse) == (HELD_OUT, True)
        assert ("indexer/indexer.safetensors" in evaluation.servers["sparse"]) == has_indexer
    assert (tmp_path / "indexer" / "indexer.md").is_file()
