"""Triton kernels against their specification in Triton's interpreter, on the CPU.

The interpreter is chosen when a kernel is defined, so the cases run in a process of their own and leave the
rest of the suite as it is. Regimes: tails shorter than a chunk, several chunks per page, more programs than
work and fewer, strided pools, NaN in everything that must not be read or written and in memory that nobody wrote.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    "op",
    [
        "checksum_pages",
        "compact_tables",
        "copy_pages",
        "ensemble_scores",
        "merge_attention",
        "project_queries",
        "score_blocks",
        "score_chunks",
        "summarise_keys",
        "translate_slots",
    ],
)
def test_kernel_matches_specification(op: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, str(Path(__file__).with_name("interpreted_cases.py")), op]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "cases agree" in result.stdout
