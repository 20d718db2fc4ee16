"""`flashmemory accuracy` on real vLLM: a capture, an indexer trained on it, and one plan of every kind of selector."""

from pathlib import Path

import pytest
import torch

from flashmemory_vllm.cli.accuracy_starts import Job, Start, measure
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.accuracy import Cell, Conditions
from flashmemory_vllm.evaluation.accuracy_rows import AccuracyRow, Setting, load_rows
from flashmemory_vllm.reference import reference_model_path
from tests.helpers.engine import EngineRun, engine_environment
from tests.helpers.modules import run_module

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's CUDA build has no CPU backend"),
]

TOKENS, QUESTIONS, BLOCK_SIZE = 1024, 4, 32
RATIO, DIM = 0.4, 32
MEMORY = ["--block-size", str(BLOCK_SIZE), "--dtype", "float32", "--gpu-memory-bytes", str(1 << 28)]
SHARED = f"tokens: [{TOKENS}], tasks: [multikey, multivalue], ratios: [{RATIO}], taus: [8], questions: {QUESTIONS}"
PLAN = f"""
why: all kinds of selectors, and what only another runtime or another wave of requests can do
cells:
  - {{selectors: [full, exact, oracle, neural], batches: [4], {SHARED}}}
  - {{selectors: [oracle], groups: [3], batches: [3], {SHARED}}}
"""


def run_command(*arguments: str) -> str:
    """Run a command of ours; its output."""
    return run_module(
        "flashmemory_vllm.cli.app", engine_environment(EngineRun(reference_model_path(), [], 1)), arguments
    )


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A measuring command, with what it needs in place."""
    folder = tmp_path_factory.mktemp("accuracy")
    capture, indexer, plan = folder / "capture", folder / "indexer.safetensors", folder / "plan.yaml"
    asked = ["--accuracy-questions", str(QUESTIONS), "--tokens", str(TOKENS), "--layer-mass", "--batch", "4"]
    run_command("capture", "--out", str(capture), *asked, *MEMORY)
    sizes = ["--epochs", "1", "--rank", "16", "--heads", "4", "--dim", str(DIM), "--tau", "8"]
    run_command("train", "--data", str(capture), "--out", str(indexer), "--validation-share", "0.2", *sizes)
    plan.write_text(PLAN)
    known = ["--oracle-data", str(capture), "--indexer", str(indexer)]
    out = ["--out", str(folder / "rows.json"), "--plot", str(folder / "plots")]
    return ["accuracy", "--plan", str(plan), *known, *out, *MEMORY, "--host-memory-gib", "0.25", "--eager"]


def rows_of(rows: list[AccuracyRow], selector: str, groups: int = 1) -> list[AccuracyRow]:
    return [row for row in rows if (row.selector, row.groups) == (selector, groups)]


def test_a_plan_is_measured_once(arguments: list[str]) -> None:
    path = Path(arguments[arguments.index("--out") + 1])
    said = run_command(*arguments)
    rows = load_rows(path)
    assert len(rows) == 2 * (4 + 1)
    assert all(row.dense_accuracy == 1.0 for row in rows)
    assert {row.resident_share for row in rows_of(rows, "full")} == {1.0}
    for row in rows:
        if row.selector != "full":
            assert row.resident_share is not None
            assert row.resident_share <= RATIO
    # Three anchor layers: for each chunk of 4 of 32 tokens a code and its scale, and a forecast's keys in fp8
    of_layer = 8 * (DIM + 4) + 2 * (32 * 64 + 4)
    assert {row.device_bytes_index_per_block for row in rows_of(rows, "neural")} == {3 * of_layer}
    assert {row.indexer for row in rows_of(rows, "neural")} == {arguments[arguments.index("--indexer") + 1]}
    # What the future is known for, few blocks answer
    for row in (*rows_of(rows, "oracle"), *rows_of(rows, "oracle", groups=3)):
        assert row.accuracy is not None
        assert row.accuracy >= 0.75
    assert {row.batch for row in rows_of(rows, "oracle", groups=3)} == {3}
    assert all(row.command.startswith("flashmemory accuracy --plan ") for row in rows)
    assert "### multivalue" in said
    assert (path.parent / "plots" / "selectors.png").is_file()

    run_command(*arguments, "--commit", "another")
    assert load_rows(path) == rows


def test_what_an_engines_process_refuses_is_told_here(tmp_path: Path) -> None:
    """It imports vLLM, then finds no capture."""
    oracle = Cell(Setting("oracle", 8, RATIO, 1), "multikey", TOKENS, QUESTIONS, 4)
    job = Job(
        reference_model_path(),
        Start([oracle], {}, {}),
        Conditions("model", BLOCK_SIZE),
        [tmp_path],
        tmp_path / "rows.json",
        ["flashmemory", "accuracy"],
        None,
        None,
    )
    with pytest.raises(ConfigError, match="allowed is the folder of a complete capture"):
        measure(job)
