"""Triton kernels against their specification in Triton's interpreter, on the CPU.

The interpreter is chosen when a kernel is defined, so the cases run in processes of their own and leave the rest of the
suite as it is: one for what each op computes, one for where it reads and writes. Regimes: tails shorter than a chunk,
several chunks per page, more programs than work and fewer, strided pools, NaN in everything that must not be read or
written and in memory that nobody wrote.
"""

import functools
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
]
# Ops without far rows hold no address that grows
WITHOUT_FAR_ROWS = ("project_queries",)
OPS = (
    "apply_step",
    "capture_queries",
    "checksum_pages",
    "choose_sets",
    "copy_pages",
    "forecast_blocks",
    "merge_attention",
    "project_queries",
    "remember_shares",
    "row_lse",
    "score_chunks",
    "score_rows",
    "summarise_keys",
)


@pytest.mark.parametrize("op", OPS)
def test_kernel_matches_specification(op: str) -> None:
    assert_agrees(op, run_interpreted("interpreted_cases.py"))


@pytest.mark.parametrize("op", [op for op in OPS if op not in WITHOUT_FAR_ROWS])
def test_rows_beyond_two_to_the_31_elements(op: str) -> None:
    """An address that wraps at 32 bits lies outside of the tensor, which ends the process."""
    assert_agrees(op, run_interpreted("far_cases.py"))


def assert_agrees(op: str, printed: str) -> None:
    """One that is not even named comes after the one that ended the process."""
    assert f"\n{op}: agrees" in printed, printed.partition(f"\n{op}: ")[2] or printed[-4000:]


@functools.cache
def run_interpreted(script: str) -> str:
    """What one of the scripts beside this file prints, one line an op."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, str(FOLDER / script)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1800)
    return f"{result.stdout}\nended with {result.returncode}\n{result.stderr}"
