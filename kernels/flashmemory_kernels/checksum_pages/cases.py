"""Inputs of `checksum_pages` shared by tests and benchmarks."""

from typing import NamedTuple

import torch


class ChecksumCase(NamedTuple):
    """n pages of page_elems elements out of P in each of L layers, rows row_elems apart."""

    num_layers: int
    num_pool_pages: int
    num_pages: int
    page_elems: int
    row_elems: int


CASES = (
    ChecksumCase(num_layers=1, num_pool_pages=4, num_pages=1, page_elems=2, row_elems=2),
    ChecksumCase(num_layers=3, num_pool_pages=9, num_pages=5, page_elems=30, row_elems=98),
    ChecksumCase(num_layers=2, num_pool_pages=7, num_pages=7, page_elems=4096, row_elems=4096),
    ChecksumCase(num_layers=2, num_pool_pages=6, num_pages=4, page_elems=4098, row_elems=12294),
)

# Pages of 16 tokens, 8 heads and 128 channels in bf16, 32 layers: a decode step's, a selection's, a prefill chunk's.
BENCH_CASES = tuple(
    ChecksumCase(num_layers=32, num_pool_pages=1024, num_pages=num_pages, page_elems=32768, row_elems=32768)
    for num_pages in (1, 64, 512)
)


class ChecksumInputs(NamedTuple):
    """Pages of random bits, and places and blocks of those that are meant."""

    pages: list[torch.Tensor]
    page_ids: torch.Tensor
    block_ids: torch.Tensor
    sums: torch.Tensor


def make_inputs(case: ChecksumCase, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> ChecksumInputs:
    """Pages are the last elements of wider rows; no sum is known yet."""
    generator = torch.Generator(device).manual_seed(0)
    row_bytes = case.row_elems * dtype.itemsize
    shape = (case.num_layers, case.num_pool_pages, row_bytes)
    rows = torch.randint(256, shape, generator=generator, dtype=torch.uint8, device=device).view(dtype)
    order = [torch.randperm(case.num_pool_pages, generator=generator, device=device) for _ in range(2)]
    ids = [permutation[: case.num_pages] for permutation in order]
    sums = torch.full((case.num_layers, case.num_pool_pages), -1, device=device)
    return ChecksumInputs(list(rows[:, :, case.row_elems - case.page_elems :]), ids[0], ids[1], sums)
