"""Inputs of `capture_queries` shared by tests and benchmarks."""

from typing import NamedTuple

import torch


class CaptureCase(NamedTuple):
    """R of T tokens say where they go, among P places of Q queries."""

    num_tokens: int
    num_rows: int
    num_heads: int
    head_dim: int
    num_places: int
    num_kept: int


CASES = (
    CaptureCase(num_tokens=1, num_rows=1, num_heads=1, head_dim=1, num_places=1, num_kept=1),
    CaptureCase(num_tokens=9, num_rows=7, num_heads=6, head_dim=20, num_places=5, num_kept=3),
    CaptureCase(num_tokens=64, num_rows=64, num_heads=3, head_dim=128, num_places=40, num_kept=5),
    CaptureCase(num_tokens=4, num_rows=0, num_heads=2, head_dim=16, num_places=2, num_kept=2),
)

# Decode of one row, of 64 and of 256, and a chunk of prefill.
BENCH_CASES = tuple(
    CaptureCase(num_tokens, num_tokens, num_heads=32, head_dim=128, num_places=256, num_kept=5)
    for num_tokens in (1, 64, 256, 1024)
)


class CaptureInputs(NamedTuple):
    """Arguments of the op."""

    query: torch.Tensor
    query_row: torch.Tensor
    queries: torch.Tensor


def make_inputs(case: CaptureCase, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> CaptureInputs:
    """Queries beside keys and values in one tensor, every third token not kept, a ring of NaN."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(max(case.num_places * case.num_kept, case.num_rows), generator=generator)
    query_row = rows[: case.num_rows].int()
    query_row[(query_row >= case.num_places * case.num_kept) | (torch.arange(case.num_rows) % 3 == 2)] = -1
    heads = torch.randn(case.num_tokens, 3 * case.num_heads, case.head_dim, generator=generator).to(dtype).to(device)
    heads[case.num_rows :] = torch.nan
    ring = (case.num_places * case.num_kept, case.num_heads, case.head_dim)
    queries = torch.full(ring, torch.nan, dtype=dtype, device=device)
    return CaptureInputs(heads[:, : case.num_heads], query_row.to(device), queries)
