"""The dense phase of `flashmemory soak`, short, in real processes: nothing leaks, and texts are vLLM's.

A batch may have one of the two LoRA adapters: vLLM takes one out and reads the other as requests of both arrive.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flashmemory_vllm.soak.rows import SoakRow, load_rows

ROOT = Path(__file__).parents[2]
# Bounds that only keep a failing test from hanging: the soak ends with its last request
TIMEOUT_SECONDS = 1800
NUM_REQUESTS = 60

pytestmark = pytest.mark.timeout(2 * TIMEOUT_SECONDS)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a soak has left its rows and all it kept."""
    return tmp_path_factory.mktemp("soak")


@pytest.fixture(scope="module")
def row(environment: dict[str, str], kept: Path) -> SoakRow:
    """Its row."""
    words = ["soak", "--phases", "dense", "--runners", "v1", "--scheduling", "async", "--max-loras", "1"]
    words += ["--requests", str(NUM_REQUESTS), "--seconds", str(TIMEOUT_SECONDS)]
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
    (only,) = load_rows(kept / "rows.json")
    return only


def test_nothing_is_wrong_and_nothing_is_left(row: SoakRow) -> None:
    assert row.problems() == []
    assert (row.requests, row.hangs) == (NUM_REQUESTS, 0)
    assert (row.leaked_slots, row.leaked_blocks, row.leaked_entries) == (0, 0, 0)


def test_dense_texts_are_the_same_while_adapters_are_swapped(row: SoakRow, kept: Path) -> None:
    assert row.tokens
    assert (row.token_differences, row.identical) == (0, row.texts)
    requests = json.loads((kept / "0-dense-v1-async" / "trace.json").read_text())["requests"]
    assert {request["adapter"] for request in requests} == {1, 2}
