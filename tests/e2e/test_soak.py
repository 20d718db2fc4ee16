"""`flashmemory soak`, short, in real processes: nothing leaks, dense texts are vLLM's, sparse answers are right.

A batch may have one of the two LoRA adapters: vLLM takes one out and reads the other as requests of both arrive.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flashmemory_vllm.soak.rows import SoakRow, load_rows

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 600
NUM_REQUESTS = 120


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a soak has left its rows and all it kept."""
    return tmp_path_factory.mktemp("soak")


@pytest.fixture(scope="module")
def rows(environment: dict[str, str], kept: Path) -> dict[str, SoakRow]:
    """Its rows by phase."""
    words = ["soak", "--runners", "v1", "--scheduling", "async", "--requests", str(NUM_REQUESTS), "--max-loras", "1"]
    words += ["--prompt-tokens", "640", "704", "--contexts", "12", "--output-tokens", "8", "40"]
    words += ["--out", str(kept / "rows.json"), "--keep", str(kept)]
    done = subprocess.run(
        [sys.executable, "-m", "flashmemory_vllm.cli.app", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_SECONDS,
        cwd=ROOT,
        env=environment,
    )
    logs = "".join(path.read_text(encoding="utf-8")[-2000:] for path in kept.glob("*/log.txt"))
    assert done.returncode == 0, done.stdout + done.stderr[-4000:] + logs
    return {row.phase: row for row in load_rows(kept / "rows.json")}


def test_nothing_is_wrong_and_nothing_is_left(rows: dict[str, SoakRow]) -> None:
    for row in rows.values():
        assert row.problems() == []
        assert (row.requests, row.hangs) == (NUM_REQUESTS // 2, 0)
        assert (row.leaked_slots, row.leaked_blocks, row.leaked_entries) == (0, 0, 0)


def test_dense_texts_are_the_same_while_adapters_are_swapped(rows: dict[str, SoakRow], kept: Path) -> None:
    row = rows["dense"]
    assert row.tokens
    assert (row.token_differences, row.identical) == (0, row.texts)
    requests = json.loads((kept / "0-dense-v1-async" / "trace.json").read_text())["requests"]
    assert {request["adapter"] for request in requests} == {1, 2}


def test_sparse_answers_are_right_under_the_invariants(rows: dict[str, SoakRow]) -> None:
    row = rows["sparse"]
    assert row.answers_right is not None
    assert row.answers_right >= 0.9
    assert (row.selector, row.ratio) == ("shipped", 0.4)
    assert row.selections
