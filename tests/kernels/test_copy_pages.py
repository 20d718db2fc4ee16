"""copy_pages: bit-exact copies between strided pools, and nothing written beside the pages asked for."""

import pytest
import torch
from flashmemory_kernels.copy_pages import copy_pages
from flashmemory_kernels.copy_pages.cases import CASES, CopyCase

DTYPES = [torch.float32, torch.bfloat16, torch.uint8]


def make_pool(case: CopyCase, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """[N, page_elems], a slice out of wider rows, of random bits (NaN patterns among them)."""
    generator = torch.Generator().manual_seed(seed)
    row_bytes = case.row_elems * dtype.itemsize
    rows = torch.randint(256, (case.num_pool_pages, row_bytes), generator=generator, dtype=torch.uint8).view(dtype)
    start = case.row_elems - case.page_elems
    return rows[:, start:]


def bits(pages: torch.Tensor) -> torch.Tensor:
    return pages.contiguous().view(torch.uint8)


def random_ids(case: CopyCase, seed: int) -> torch.Tensor:
    return torch.randperm(case.num_pool_pages, generator=torch.Generator().manual_seed(seed))[: case.num_pages]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_move_gather_and_scatter(case: CopyCase, dtype: torch.dtype) -> None:
    source, source_ids, target_ids = make_pool(case, dtype, 0), random_ids(case, 1), random_ids(case, 2)
    wanted = bits(source)[source_ids]

    target = make_pool(case, dtype, 3)
    expected = bits(target).clone()
    expected[target_ids] = wanted
    copy_pages(source, source_ids, target, target_ids)
    assert torch.equal(bits(target), expected)

    for staging in (make_pool(case, dtype, 4), make_pool(case, dtype, 4).contiguous()):
        expected = bits(staging).clone()
        expected[: case.num_pages] = wanted
        copy_pages(source, source_ids, staging, None)
        assert torch.equal(bits(staging), expected)

    target = make_pool(case, dtype, 5)
    expected = bits(target).clone()
    expected[target_ids] = bits(source)[: case.num_pages]
    copy_pages(source, None, target, target_ids)
    assert torch.equal(bits(target), expected)


def test_wrong_arguments_are_named() -> None:
    pool, ids = torch.zeros(4, 8), torch.arange(2)
    with pytest.raises(ValueError, match=r"target: expected shape \[\*, 8\], got \[4, 6\]"):
        copy_pages(pool, ids, torch.zeros(4, 6), ids)
    with pytest.raises(ValueError, match=r"target_ids: expected dtype torch.int64, got torch.int32"):
        copy_pages(pool, ids, pool.clone(), ids.int())
    with pytest.raises(ValueError, match=r"target_ids: expected shape \[2\], got \[3\]"):
        copy_pages(pool, ids, pool.clone(), torch.arange(3))
    with pytest.raises(ValueError, match=r"source_ids: .* got None for both"):
        copy_pages(pool, None, pool.clone(), None)
    with pytest.raises(ValueError, match=r"target: expected at least 2 pages, got 1"):
        copy_pages(pool, ids, torch.zeros(1, 8), None)
    with pytest.raises(ValueError, match=r"source: expected contiguous pages \(stride 1\)"):
        copy_pages(torch.zeros(8, 4).T, ids, pool.clone(), ids)
