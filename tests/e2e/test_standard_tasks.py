"""Benchmarks that others defined, asked of a real server: RULER through its harness, and LongBench v2."""

import importlib.util
import json
from pathlib import Path

import pytest

from flashmemory_vllm.cli.server import MODEL_NAME, Server
from flashmemory_vllm.evaluation.longbench import LongBenchOptions, run_longbench
from flashmemory_vllm.evaluation.ruler import run_ruler
from flashmemory_vllm.evaluation.vocabulary import decode
from flashmemory_vllm.reference import reference_model_path

TOKENIZER = str(reference_model_path())
RULER_TOKENS = 3072
LIMIT = 2
PROMPTS = "vllm:prompt_tokens_total"


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_the_harness_asks_the_server(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model knows no English: what counts is that the harness's prompts were answered from a sparse cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = server.read_metrics()
    (row,) = run_ruler(server.url, MODEL_NAME, TOKENIZER, ["niah_single_1"], [RULER_TOKENS], LIMIT, tmp_path / "sparse")
    after = server.read_metrics()
    assert (row["task"], row["tokens"], row["questions"]) == ("niah_single_1", RULER_TOKENS, LIMIT)
    assert 0.0 <= row["accuracy"] <= 1.0
    assert "lm-eval" in row["versions"]
    (samples,) = (tmp_path / "sparse" / "ruler" / f"niah_single_1-{RULER_TOKENS}").glob("samples_*.jsonl")
    answered = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    assert len({sample["doc"]["outputs"][0] for sample in answered}) == LIMIT
    assert all(isinstance(sample["resps"][0][0], str) for sample in answered)
    asked = after[PROMPTS] - before[PROMPTS]
    assert 0.8 * LIMIT * RULER_TOKENS < asked < LIMIT * RULER_TOKENS
    resident = after["flashmemory:decode_resident_blocks_total"] - before["flashmemory:decode_resident_blocks_total"]
    context = after["flashmemory:decode_context_blocks_total"] - before["flashmemory:decode_context_blocks_total"]
    assert 0 < resident < 0.2 * context


def test_longbench_asks_the_server(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    common = {"domain": "d", "sub_domain": "s", "question": "q", "choice_A": "a", "choice_B": "b", "choice_C": "c"}
    common |= {"choice_D": "d", "answer": "A"}
    # The words of a prompt that is cut must be in the vocabulary, or the cut loses them
    shares = [("easy", "short", "a"), ("hard", "medium", "b"), ("hard", "long", f"{decode([20])} " * 4000)]
    for index, (difficulty, length, context) in enumerate(shares):
        fields = {"_id": str(index), "difficulty": difficulty, "length": length, "context": context}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(common | fields) + "\n")
    before = server.read_metrics()
    options = LongBenchOptions(answer_tokens=32)
    rows = run_longbench(server.url, MODEL_NAME, TOKENIZER, path, tmp_path / "sparse", 3000, options)
    after = server.read_metrics()
    assert [(row["task"], row["questions"]) for row in rows] == [
        ("all", 3),
        ("easy", 1),
        ("hard", 2),
        ("short", 1),
        ("medium", 1),
        ("long", 1),
    ]
    # The model cannot write the asked form: none of its answers counts
    assert (rows[0]["accuracy"], rows[0]["unparsable"], rows[0]["truncated"]) == (0.0, 3, 1)
    assert after["vllm:request_success_total"] - before["vllm:request_success_total"] == 3
    asked = after[PROMPTS] - before[PROMPTS]
    assert 2800 < asked < 3200
