"""RULER and LongBench as parts of an evaluation: what they are asked with, and figures of their rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from flashmemory_vllm.evaluation import standard_parts
from flashmemory_vllm.evaluation.longbench import LongBenchOptions
from flashmemory_vllm.evaluation.provenance import Provenance
from flashmemory_vllm.evaluation.ruler import RulerOptions
from flashmemory_vllm.evaluation.standard_parts import LongBenchPart, RulerPart
from flashmemory_vllm.evaluation.target import Target
from flashmemory_vllm.reference import reference_model_path
from tests.unit.evaluation.fake_server import MODEL, FakeServer
from tests.unit.evaluation.test_longbench_questions import ITEM

TOKENIZER = str(reference_model_path())
PROVENANCE = Provenance("command", "commit", "gpu", {})


def test_one_task_of_ruler_is_one_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def run_ruler(*arguments: Any) -> list[dict[str, Any]]:
        asked.append(arguments)
        row = {"task": "ruler_vt", "tokens": 4096, "questions": 5, "accuracy": 0.5, "stderr": 0.25}
        return [row | {"unparsable": None, "truncated": None}]

    monkeypatch.setattr(standard_parts, "run_ruler", run_ruler)
    options = RulerOptions(provenance=PROVENANCE)
    with FakeServer(str) as server:
        target = Target.connect("sparse", server.url, MODEL)
        (figures,) = RulerPart("ruler_vt", 4096, TOKENIZER, 5, tmp_path, options).measure(target)
    assert asked == [(server.url, MODEL, TOKENIZER, ["ruler_vt"], [4096], 5, tmp_path / "sparse", options)]
    assert (figures.task, figures.tokens, figures.questions, figures.score) == ("ruler_vt", 4096, 5, 0.5)
    assert figures.details == {"stderr": 0.25}


def test_longbench_is_asked_greedily_and_by_split(tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([ITEM | {"_id": str(index)} for index in range(2)]), encoding="utf-8")
    part = LongBenchPart(path, TOKENIZER, 1000, tmp_path / "out", LongBenchOptions(provenance=PROVENANCE))
    with FakeServer(lambda _: "The correct answer is (B)") as server:
        figures = part.measure(Target.connect("dense", server.url, MODEL))
    assert [(one.task, one.questions, one.score) for one in figures] == [
        ("all", 2, 1.0),
        ("easy", 2, 1.0),
        ("short", 2, 1.0),
    ]
    assert figures[0].details["unparsable"] == 0
    assert {body["temperature"] for _, body in server.requests} == {0.0}
    assert (tmp_path / "out" / "dense" / "longbench-v2.json").is_file()
