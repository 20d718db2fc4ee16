"""Run with TRITON_INTERPRET=1 as `python interpreted_cases.py OP`; see test_triton_interpreter.py."""

import itertools
import sys
from typing import Any

import torch
from flashmemory_kernels.copy_pages.cases import CASES as COPY_CASES
from flashmemory_kernels.copy_pages.kernel import copy_pages_triton
from flashmemory_kernels.copy_pages.naive import copy_pages_naive
from flashmemory_kernels.merge_attention.cases import CASES as MERGE_CASES
from flashmemory_kernels.merge_attention.kernel import merge_attention_triton
from flashmemory_kernels.merge_attention.naive import merge_attention_naive
from flashmemory_kernels.score_blocks.cases import CASES as SCORE_CASES
from flashmemory_kernels.score_blocks.kernel import score_blocks_triton
from flashmemory_kernels.score_blocks.naive import score_blocks_naive

# exp and log of numpy against torch, and one division: a few float32 roundings.
TOL_FP32: dict[str, Any] = {"rtol": 3e-6, "atol": 3e-6}
# A dot product of at most 256 terms in another order.
TOL_FP32_SUM: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
# The same float32 result may round to either neighbour in bf16.
TOL_BF16: dict[str, Any] = {"rtol": 2**-7, "atol": 1e-6}


def check_copy_pages() -> int:
    count = 0
    modes = list(itertools.product((True, False), repeat=2))[:-1]
    for case, dtype, programs, (by_source, by_target) in itertools.product(
        COPY_CASES, (torch.float32, torch.bfloat16), (1, 5), modes
    ):
        generator = torch.Generator().manual_seed(count)

        rows = torch.randn(case.num_pool_pages, case.row_elems, generator=generator).to(dtype)
        source = rows[:, case.row_elems - case.page_elems :]
        ids = [torch.randperm(case.num_pool_pages, generator=generator)[: case.num_pages] for _ in range(2)]
        source_ids, target_ids = ids[0] if by_source else None, ids[1] if by_target else None
        got = torch.full((case.num_pool_pages, case.row_elems), torch.nan, dtype=dtype)
        expected = got.clone()
        copy_pages_triton(source, source_ids, got[:, : case.page_elems], target_ids, num_programs=programs)
        copy_pages_naive(source, source_ids, expected[:, : case.page_elems], target_ids)
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8)), (case, dtype, programs)
        count += 1
    return count


def check_merge_attention() -> int:
    for case, (dtype, tolerance) in itertools.product(
        MERGE_CASES, ((torch.float32, TOL_FP32), (torch.bfloat16, TOL_BF16))
    ):
        generator = torch.Generator().manual_seed(0)
        outs = [torch.randn(case, generator=generator).to(dtype) for _ in range(2)]
        lses = [torch.randn(case.num_heads, case.num_tokens, generator=generator) * 5 for _ in range(2)]
        # Token 0: part a empty; last token: both empty. Their buffers hold NaN.
        for part, token, empty in ((0, 0, -torch.inf), (0, -1, -torch.inf), (1, -1, torch.inf)):
            lses[part][:, token] = empty
            outs[part][token] = torch.nan
        out, lse = merge_attention_triton(outs[0], lses[0], outs[1], lses[1])
        expected_out, expected_lse = merge_attention_naive(outs[0], lses[0], outs[1], lses[1])
        torch.testing.assert_close(out, expected_out, **tolerance)
        torch.testing.assert_close(lse, expected_lse, **TOL_FP32)
        assert not out.isnan().any()
    return len(MERGE_CASES) * 2


def check_score_blocks() -> int:
    dtypes = (torch.float32, torch.bfloat16)
    for case, dtype in itertools.product(SCORE_CASES, dtypes):
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(case.num_heads, case.width, generator=generator).to(dtype)
        ids = torch.randperm(case.num_pool_blocks, generator=generator)[: case.num_blocks]
        index = torch.full((case.num_pool_blocks, case.num_kv_heads, case.num_rows, case.width), torch.nan)
        index[ids] = torch.randn(case.num_blocks, *index.shape[1:], generator=generator)
        index = index.to(dtype)
        got = score_blocks_triton(query, index, ids, 0.3)
        torch.testing.assert_close(got, score_blocks_naive(query, index, ids, 0.3), **TOL_FP32_SUM)
    return len(SCORE_CASES) * len(dtypes)


if __name__ == "__main__":
    checks = {
        "copy_pages": check_copy_pages,
        "merge_attention": check_merge_attention,
        "score_blocks": check_score_blocks,
    }
    sys.stdout.write(f"{checks[sys.argv[1]]()} cases agree\n")
