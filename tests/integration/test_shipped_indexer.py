"""The shipped indexer on real vLLM: it answers, and a two-hop question needs the selections of its opening."""

from pathlib import Path

import pytest
import torch

from flashmemory_vllm.evaluation.accuracy_rows import load_rows
from flashmemory_vllm.reference import reference_indexer_path
from tests.integration.test_accuracy import run_command

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's CUDA build has no CPU backend"),
]

QUESTIONS = 20
PLAN = f"""
why: what the shipped indexer finds at 4,096 tokens with 13.5 % of the blocks, and what its opening is worth
cells:
  - &one
    selectors: [neural]
    tokens: [4096]
    tasks: [multiquery, tracking, late]
    taus: [64]
    questions: {QUESTIONS}
  - {{<<: *one, tasks: [tracking], opening_steps: [0]}}
"""


def test_it_answers_as_dense_attention_and_two_hops_with_its_opening(tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.yaml", tmp_path / "rows.json"
    plan.write_text(PLAN)
    known = ["--plan", str(plan), "--out", str(out), "--indexer", str(reference_indexer_path()), "--eager"]
    memory = ["--dtype", "float32", "--gpu-memory-bytes", str(1 << 29), "--host-memory-gib", "1"]
    run_command("accuracy", *known, *memory)
    accuracy = {(row.task, row.opening_steps): row.accuracy or 0.0 for row in load_rows(out)}
    # The model itself answers every question
    assert accuracy["multiquery", None] >= 0.95
    assert accuracy["late", None] >= 0.95
    assert accuracy["tracking", None] >= accuracy["tracking", 0] + 0.2
