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
FOLDER = Path(__file__).parent


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    "op",
    [
        "apply_step",
        "capture_queries",
        "checksum_pages",
        "choose_sets",
        "copy_pages",
        "ensemble_scores",
        "merge_attention",
        "project_queries",
        "remember_shares",
        "row_lse",
        "score_blocks",
        "score_chunks",
        "score_rows",
        "summarise_keys",
    ],
)
def test_kernel_matches_specification(op: str) -> None:
    assert "cases agree" in run_interpreted("interpreted_cases.py", op)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    "op",
    [
        "apply_step",
        "capture_queries",
        "checksum_pages",
        "choose_sets",
        "copy_pages",
        "merge_attention",
        "remember_shares",
        "row_lse",
        "score_blocks",
        "score_chunks",
        "score_rows",
        "summarise_keys",
    ],
)
def test_rows_beyond_two_to_the_31_elements(op: str) -> None:
    """An address that wraps at 32 bits lies outside of the tensor, which ends the process."""
    assert "far rows agree" in run_interpreted("far_cases.py", op)


def run_interpreted(script: str, op: str) -> str:
    """What one of the scripts beside this file prints for an op."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, str(FOLDER / script), op]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1800)
    assert result.returncode == 0, f"{result.returncode}: {result.stdout}{result.stderr}"
    return result.stdout
