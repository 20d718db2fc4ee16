"""Compiled Triton kernels against their specification on the same GPU tensors.

Regimes: every case of the ops' `cases.py`, low precision, NaN in what must not be read, and pinned host
memory on either side of a copy.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flashmemory_kernels.copy_pages import copy_pages
from flashmemory_kernels.copy_pages.cases import CASES as COPY_CASES
from flashmemory_kernels.copy_pages.cases import CopyCase
from flashmemory_kernels.merge_attention import merge_attention
from flashmemory_kernels.merge_attention.cases import CASES as MERGE_CASES
from flashmemory_kernels.merge_attention.cases import MergeCase
from flashmemory_kernels.merge_attention.naive import merge_attention_naive
from flashmemory_kernels.score_blocks import score_blocks
from flashmemory_kernels.score_blocks.cases import CASES as SCORE_CASES
from flashmemory_kernels.score_blocks.cases import ScoreCase
from flashmemory_kernels.score_blocks.naive import score_blocks_naive

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# exp, log and one division in float32 by two compilers.
TOL_FP32: dict[str, Any] = {"rtol": 3e-6, "atol": 3e-6}
# A dot product of at most 256 terms in another order.
TOL_FP32_SUM: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
# The same float32 result may round to either neighbour in bf16.
TOL_BF16: dict[str, Any] = {"rtol": 2**-7, "atol": 1e-6}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", MERGE_CASES)
def test_merge_attention(case: MergeCase, dtype: torch.dtype) -> None:
    outs = torch.randn(2, *case, device="cuda").to(dtype)
    lses = torch.randn(2, case.num_heads, case.num_tokens, device="cuda") * 5
    outs[0, 0], lses[0, :, 0] = torch.nan, -torch.inf
    outs[:, -1], lses[0, :, -1], lses[1, :, -1] = torch.nan, -torch.inf, torch.inf
    got = merge_attention(outs[0], lses[0], outs[1], lses[1])
    expected = merge_attention_naive(outs[0], lses[0], outs[1], lses[1])
    torch.testing.assert_close(got[0], expected[0], **(TOL_FP32 if dtype == torch.float32 else TOL_BF16))
    torch.testing.assert_close(got[1], expected[1], **TOL_FP32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SCORE_CASES)
def test_score_blocks(case: ScoreCase, dtype: torch.dtype) -> None:
    query = torch.randn(case.num_heads, case.width, device="cuda").to(dtype)
    ids = torch.randperm(case.num_pool_blocks, device="cuda")[: case.num_blocks]
    shape = (case.num_pool_blocks, case.num_kv_heads, case.num_rows, case.width)
    index = torch.full(shape, torch.nan, dtype=dtype, device="cuda")
    index[ids] = torch.randn(case.num_blocks, *shape[1:], device="cuda").to(dtype)
    expected = score_blocks_naive(query, index, ids, 0.3)
    torch.testing.assert_close(score_blocks(query, index, ids, 0.3), expected, **TOL_FP32_SUM)


@pytest.mark.parametrize("places", ["host_to_device", "device_to_host", "device_to_device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", COPY_CASES)
def test_copy_pages(case: CopyCase, dtype: torch.dtype, places: str) -> None:
    rows = torch.randn(2, case.num_pool_pages, case.row_elems).to(dtype)
    source, target = rows[:, :, case.row_elems - case.page_elems :]
    source_ids, target_ids = (torch.randperm(case.num_pool_pages)[: case.num_pages] for _ in range(2))
    expected = target.clone()
    expected[target_ids] = source[source_ids]
    from_place, to_place = places.split("_to_")
    device_rows = [
        side.cuda() if place == "device" else side.pin_memory()
        for side, place in zip(rows, (from_place, to_place), strict=True)
    ]
    start = case.row_elems - case.page_elems
    copy_pages(device_rows[0][:, start:], source_ids.cuda(), device_rows[1][:, start:], target_ids.cuda())
    torch.cuda.synchronize()
    assert torch.equal(device_rows[1][:, start:].cpu(), expected)
    # The rest of the rows is as it was.
    assert torch.equal(device_rows[1][:, :start].cpu(), rows[1, :, :start])
