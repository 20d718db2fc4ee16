"""The shipped indexer answers a question alike first, again, as any child, in any chunks, and after a preemption."""

import json

import pytest
import torch

from tests.helpers.engine import EngineRun, engine_environment
from tests.helpers.modules import ROOT, run_module
from tests.integration.schedule_main import LAST_CHUNKS, NUM_QUESTIONS, PREEMPTED_AFTER

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's CUDA build has no CPU backend"),
]
WAYS = [
    "first",
    "again",
    *(f"child {child}" for child in range(3)),
    *(f"preempted after {after}" for after in PREEMPTED_AFTER),
    *(f"last chunk {tokens}" for tokens in LAST_CHUNKS),
]


@pytest.fixture(scope="module")
def right() -> dict[str, int]:
    """Right answers of each way to ask."""
    printed = run_module("tests.integration.schedule_main", engine_environment(EngineRun(ROOT, [], 1)))
    mark = "right answers: "
    found: dict[str, int] = json.loads(
        next(line for line in printed.splitlines() if line.startswith(mark)).removeprefix(mark)
    )
    return found


@pytest.mark.parametrize("way", WAYS)
def test_answers_do_not_depend_on_the_schedule(right: dict[str, int], way: str) -> None:
    # The model itself answers every one of these
    assert right[way] == NUM_QUESTIONS
