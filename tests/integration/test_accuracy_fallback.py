"""Dense fallbacks on real vLLM: with slots they win lost paths back, without any they are refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashmemory_vllm.cli.accuracy import make_cells, make_starts, read_shape
from flashmemory_vllm.cli.accuracy_starts import Job, measure
from flashmemory_vllm.cli.app import build_parser
from flashmemory_vllm.evaluation.accuracy import Conditions
from flashmemory_vllm.evaluation.accuracy_rows import AccuracyRow, load_rows

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's CUDA build has no CPU backend"),
]

QUESTIONS, BATCH = 3, 4
# There are slots for BATCH requests, and fallbacks take 90 % of them, so QUESTIONS can fall back at once.
# Of a request of 70 blocks with its answer: one chunk of prefill fits, but all blocks are above the high watermark
FEW_SLOTS = 76
PLAN = f"""
why: what fallbacks are worth, and what they are without slots
cells:
  - {{selectors: [full, exact], tasks: [path, latepath], tokens: [2048], device_shares: [0.45], taus: [16],
     score_thresholds: [0.01], batches: [{BATCH}], questions: {QUESTIONS}, fallback_shares: [null, 0.3],
     options: {{memory_decay: 0, question_share: 0, successor_share: 0, hysteresis: 0, index_dtype: auto}}}}
"""

Measure = Callable[[int | None], list[AccuracyRow]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """Measure the plan with so many slots, None for as many as the memory holds."""
    folder = tmp_path_factory.mktemp("fallback")
    plan = folder / "plan.yaml"
    plan.write_text(PLAN)
    given = ["--plan", str(plan), "--dtype", "float32", "--eager", "--gpu-memory-bytes", str(1 << 28)]
    known: dict[int | None, list[AccuracyRow]] = {}

    def measured(slots: int | None) -> list[AccuracyRow]:
        if slots not in known:
            known[slots] = _measure([*given, "--host-memory-gib", "0.25"], folder / f"{slots}.json", slots)
        return known[slots]

    return measured


def _measure(given: list[str], path: Path, slots: int | None) -> list[AccuracyRow]:
    args = build_parser().parse_args(["accuracy", "--out", str(path), *given])
    shape = read_shape(args)
    conditions = Conditions(args.model.name, shape.block_size, block_bytes=shape.block_bytes)
    cells = make_cells(args)
    if slots is not None:
        # Dense attention needs all slots, so it is not asked where there are few
        cells = [cell for cell in cells if cell.setting.selector != "full" and cell.task == "latepath"]
    (start,) = make_starts(args, cells)
    if slots is not None:
        start = replace(start, options={**start.options, "device_slots": slots})
    measure(Job(args.model, start, conditions, [], path, ["flashmemory", "accuracy"], "commit", None))
    return load_rows(path)


def of(rows: list[AccuracyRow], task: str, selector: str = "exact", fallback: float | None = None) -> AccuracyRow:
    (row,) = (row for row in rows if (row.task, row.selector, row.fallback_share) == (task, selector, fallback))
    return row


def score(row: AccuracyRow) -> float:
    assert row.accuracy is not None
    return row.accuracy


def test_with_slots_a_path_that_was_lost_is_followed_again(rows: Measure) -> None:
    dense, lost, won = (
        of(rows(None), "latepath", *which) for which in (("full", None), ("exact", None), ("exact", 0.3))
    )
    assert score(dense) > 0.8
    assert score(lost) < score(dense) / 3
    assert score(won) > 0.9 * score(dense)
    assert (won.fallbacks, won.refused_fallbacks) == (QUESTIONS, 0)
    assert (lost.fallbacks, lost.refused_fallbacks) == (None, None)
    # It takes what it promises, and no more comes for free
    assert won.device_bytes is not None
    assert lost.device_bytes is not None
    assert dense.device_bytes is not None
    assert lost.device_bytes <= 0.45 * dense.device_bytes < won.device_bytes


def test_a_fallback_comes_too_late_for_a_path_that_begins_at_once(rows: Measure) -> None:
    """It needs two selections; the second is 16 tokens after the first, eight hops on."""
    dense, falls_back = of(rows(None), "path", "full"), of(rows(None), "path", fallback=0.3)
    assert falls_back.fallbacks
    assert score(falls_back) < score(dense) / 3


def test_without_slots_nothing_changes_but_the_count_of_what_was_refused(rows: Measure) -> None:
    refused, never_asked = of(rows(FEW_SLOTS), "latepath", fallback=0.3), of(rows(FEW_SLOTS), "latepath")
    assert (refused.accuracy, refused.resident_share) == (never_asked.accuracy, never_asked.resident_share)
    assert refused.fallbacks == 0
    assert refused.refused_fallbacks
