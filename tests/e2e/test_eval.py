"""`flashmemory eval` on real servers: a good selector passes its gate and a broken one fails it."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flashmemory_vllm.cli import app
from flashmemory_vllm.evaluation.eval_rows import Evaluation, load_evaluation
from flashmemory_vllm.evaluation.gate import judge
from flashmemory_vllm.evaluation.loss import Losses, loss_lines
from flashmemory_vllm.evaluation.parity import Comparison
from flashmemory_vllm.evaluation.tasks import ANSWER_LENS, make_samples
from flashmemory_vllm.evaluation.vocabulary import decode
from tests.e2e.conftest import ROOT
from tests.helpers import worst_selector

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's CUDA build has no CPU backend")

TOKENS, DEPTHS, QUESTIONS, RATIO = 3072, 4, 1, 0.3
OPTIONS = f'{{"flashmemory": {{"selector": "exact", "indexer": null, "resident_ratio": {RATIO}}}}}'
ASKED = ["--lengths", str(TOKENS), "--depths", str(DEPTHS), "--questions", str(QUESTIONS)]
ASKED += ["--suites", "parity,needles,loss", "--parity-prompts", "1", "--parity-tokens", "8", "--concurrency", "2"]
LOSS_TOKENS, DOCUMENTS = ANSWER_LENS["multikey"], 2
ASKED += ["--loss-tokens", str(LOSS_TOKENS), "--documents", str(DOCUMENTS)]
# So that the slots of that file have room for a request's budget at this ratio
ASKED += ["--serve-args=--max-model-len 5120"]
GATE = ["--additional-config", OPTIONS, "--min-relative", "0.99", "--max-loss", "0.2"]


@pytest.fixture
def in_checkout(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command finds the shipped model's configuration, and its servers find our plugin."""
    monkeypatch.chdir(ROOT)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["flashmemory", "eval", *arguments])
    return app.main(["eval", *arguments])


def write_text(path: Path) -> list[str]:
    """Texts that end with an answer which lies far back, dear to who cannot look; the option that names them."""
    samples = make_samples("multikey", TOKENS, DOCUMENTS, seed=7)
    texts = [decode(np.concatenate([sample.prompt_ids, sample.answer_ids])[1:].tolist()) for sample in samples]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return ["--texts", str(path)]


def read(folder: Path) -> Evaluation:
    evaluation = load_evaluation(folder)
    assert evaluation is not None
    return evaluation


def parity(folder: Path) -> dict[str, Comparison]:
    return {row.side: Comparison(**row.details) for row in read(folder).rows if row.suite == "parity"}


@pytest.mark.usefixtures("in_checkout")
def test_the_gate_tells_a_good_selector_from_a_broken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, broken = tmp_path / "good", tmp_path / "broken"
    asked = [*ASKED, *write_text(tmp_path / "texts.jsonl")]
    assert evaluate(monkeypatch, "--out", str(good), *asked, *GATE) == 0
    (line,) = judge(read(good))
    assert (line.dense, line.sparse, line.questions) == (1.0, 1.0, DEPTHS * QUESTIONS)
    assert line.resident_share is not None
    assert 0.2 < line.resident_share < RATIO + 0.05
    assert read(good).servers["dense"].startswith("vllm serve ")
    # Greedy, in float32, one at a time: the control is exact, and what prefill wrote is
    assert parity(good)["dense"].identical == [True]
    assert max(values[0] for values in parity(good)["sparse"].kl) < 1e-6

    (loss,) = loss_lines(read(good))
    assert (loss.documents, loss.steps, loss.is_sparse) == (DOCUMENTS, LOSS_TOKENS, True)
    # Prefill, which writes the first token, is the same on both sides
    first = {
        row.side: Losses(**row.details).first
        for row in read(good).of("loss", "dense") + read(good).of("loss", "sparse")
    }
    assert first["sparse"] == pytest.approx(first["dense"], abs=1e-4)
    assert loss.fetched_blocks is not None

    # Nothing is left to ask, so no server is started
    rows = read(good).rows
    assert evaluate(monkeypatch, "--out", str(good), *asked, *GATE) == 0
    assert read(good).rows == rows

    worst_selector.write_entry_point(tmp_path / "plugin")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'plugin'}{os.pathsep}{os.environ['PYTHONPATH']}")
    monkeypatch.setenv("VLLM_PLUGINS", f"flashmemory,{worst_selector.NAME}")
    capsys.readouterr()
    assert evaluate(monkeypatch, "--out", str(broken), "--dense-from", str(good), *asked, *GATE) == 1
    (line,) = judge(read(broken))
    assert line.dense == 1.0
    assert line.relative is not None
    assert line.relative < 0.6
    # The first and the last needle can lie among the tokens that are always resident
    assert [row.score for row in read(broken).of("needles", "sparse")][1:-1] == [0.0] * (DEPTHS - 2)
    said = capsys.readouterr().err
    assert "gate failed, asked is 0.99 of the dense score or more and a loss of at most 0.2 nats" in said
    assert "needles needle at 3,072 tokens, loss at 3,072 tokens" in said
    assert "| fail |" in (broken / "report.md").read_text(encoding="utf-8")
