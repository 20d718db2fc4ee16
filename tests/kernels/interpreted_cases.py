"""Run with TRITON_INTERPRET=1 as `python interpreted_cases.py [OP...]`; see test_triton_interpreter.py."""

import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from flashmemory_kernels.apply_step.cases import CASES as STEP_CASES
from flashmemory_kernels.apply_step.cases import make_inputs as step_inputs
from flashmemory_kernels.apply_step.kernel import apply_step_triton
from flashmemory_kernels.apply_step.naive import apply_step_naive
from flashmemory_kernels.capture_queries.cases import CASES as CAPTURE_CASES
from flashmemory_kernels.capture_queries.cases import make_inputs as capture_inputs
from flashmemory_kernels.capture_queries.kernel import capture_queries_triton
from flashmemory_kernels.capture_queries.naive import capture_queries_naive
from flashmemory_kernels.checksum_pages import PageSet
from flashmemory_kernels.checksum_pages.cases import CASES as CHECKSUM_CASES
from flashmemory_kernels.checksum_pages.cases import make_inputs as checksum_inputs
from flashmemory_kernels.checksum_pages.kernel import store_checksums_triton, verify_checksums_triton
from flashmemory_kernels.checksum_pages.naive import store_checksums_naive
from flashmemory_kernels.choose_sets.cases import CASES as CHOICE_CASES
from flashmemory_kernels.choose_sets.cases import WIDE_CASE
from flashmemory_kernels.choose_sets.cases import make_inputs as choice_inputs
from flashmemory_kernels.choose_sets.kernel import choose_sets_triton
from flashmemory_kernels.choose_sets.naive import choose_sets_naive
from flashmemory_kernels.common import TileConfig
from flashmemory_kernels.common.due_rows import padded_mass, scored_rows
from flashmemory_kernels.copy_pages.cases import CASES as COPY_CASES
from flashmemory_kernels.copy_pages.kernel import copy_pages_triton
from flashmemory_kernels.copy_pages.naive import copy_pages_naive
from flashmemory_kernels.forecast_blocks.cases import CASES as FORECAST_CASES
from flashmemory_kernels.forecast_blocks.cases import make_inputs as forecast_inputs
from flashmemory_kernels.forecast_blocks.kernel import forecast_blocks_triton
from flashmemory_kernels.forecast_blocks.naive import forecast_blocks_naive
from flashmemory_kernels.merge_attention.cases import CASES as MERGE_CASES
from flashmemory_kernels.merge_attention.kernel import merge_attention_triton
from flashmemory_kernels.merge_attention.naive import merge_attention_naive
from flashmemory_kernels.project_queries.cases import CASES as PROJECT_CASES
from flashmemory_kernels.project_queries.cases import make_inputs as project_inputs
from flashmemory_kernels.project_queries.kernel import project_queries_triton
from flashmemory_kernels.project_queries.naive import project_queries_naive
from flashmemory_kernels.remember_shares.cases import CASES as REMEMBER_CASES
from flashmemory_kernels.remember_shares.cases import make_inputs as remember_inputs
from flashmemory_kernels.remember_shares.kernel import remember_shares_triton
from flashmemory_kernels.remember_shares.naive import remember_shares_naive
from flashmemory_kernels.row_lse.cases import CASES as LSE_CASES
from flashmemory_kernels.row_lse.cases import make_inputs as lse_inputs
from flashmemory_kernels.row_lse.kernel import row_lse_triton
from flashmemory_kernels.row_lse.naive import row_lse_naive
from flashmemory_kernels.score_chunks.cases import CASES as CHUNK_CASES
from flashmemory_kernels.score_chunks.cases import make_inputs as chunk_inputs
from flashmemory_kernels.score_chunks.kernel import CONFIG, score_chunks_triton
from flashmemory_kernels.score_chunks.naive import score_chunks_naive
from flashmemory_kernels.score_rows import kernel as score_rows_kernel
from flashmemory_kernels.score_rows.cases import CASES as SCORE_ROWS_CASES
from flashmemory_kernels.score_rows.cases import make_inputs as score_rows_inputs
from flashmemory_kernels.score_rows.naive import score_rows_naive
from flashmemory_kernels.summarise_keys.cases import CASES as SUMMARY_CASES
from flashmemory_kernels.summarise_keys.cases import KINDS, make_fp8_inputs
from flashmemory_kernels.summarise_keys.cases import make_inputs as summary_inputs
from flashmemory_kernels.summarise_keys.kernel import summarise_keys_triton
from flashmemory_kernels.summarise_keys.naive import summarise_keys_naive

from tests.helpers.poisoned import poisoned_memory
from tests.helpers.reports import report

# exp and log of numpy against torch, and one division: a few float32 roundings.
TOL_FP32: dict[str, Any] = {"rtol": 3e-6, "atol": 3e-6}
# A dot product of at most 256 terms in another order.
TOL_FP32_SUM: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
# Sums of at most 16 heads of 128 products; a query head is known to 2^-22 of its largest element.
TOL_CHUNKS: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-4}
# The same float32 result may round to either neighbour in bf16.
TOL_BF16: dict[str, Any] = {"rtol": 2**-7, "atol": 1e-6}


def check_checksum_pages() -> None:
    dtypes = (torch.float32, torch.bfloat16)
    for case, dtype in itertools.product(CHECKSUM_CASES, dtypes):
        given = checksum_inputs(case, dtype)
        pages, ids = PageSet(given.pages), (given.page_ids, given.block_ids)
        expected = given.sums.clone()
        store_checksums_naive(pages.words, ids[0], expected, ids[1])
        where = (pages.addresses, pages.stride_words, pages.num_words)
        store_checksums_triton(*where, ids[0], given.sums, ids[1])
        assert torch.equal(given.sums, expected), (case, dtype)
        mended = [words.clone() for words in pages.words]
        mended[-1][ids[0][0]] = 0
        given.pages[-1].view(torch.int32)[ids[0][0], -1] ^= 1 << 30
        wrong = torch.empty(case.num_layers, case.num_pages, dtype=torch.uint8)
        verify_checksums_triton(*where, ids[0], given.sums, ids[1], wrong)
        assert wrong.nonzero().tolist() == [[case.num_layers - 1, 0]], (case, dtype)
        assert int(wrong.max()) == 1
        assert all(map(torch.equal, pages.words, mended)), (case, dtype)


def check_copy_pages() -> None:
    modes = list(itertools.product((True, False), repeat=2))[:-1]
    regimes = itertools.product(COPY_CASES, (torch.float32, torch.bfloat16), (1, 5), modes)
    for seed, (case, dtype, programs, (by_source, by_target)) in enumerate(regimes):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(case.num_pool_pages, case.row_elems, generator=generator).to(dtype)
        source = rows[:, case.row_elems - case.page_elems :]
        ids = [torch.randperm(case.num_pool_pages, generator=generator)[: case.num_pages] for _ in range(2)]
        source_ids, target_ids = ids[0] if by_source else None, ids[1] if by_target else None
        got = torch.full((case.num_pool_pages, case.row_elems), torch.nan, dtype=dtype)
        expected = got.clone()
        copy_pages_triton(source, source_ids, got[:, : case.page_elems], target_ids, num_programs=programs)
        copy_pages_naive(source, source_ids, expected[:, : case.page_elems], target_ids)
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8)), (case, dtype, programs)


def check_merge_attention() -> None:
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


def check_project_queries() -> None:
    of_one_token = [case for case in PROJECT_CASES if case.num_tokens == 1]
    for case, dtype in itertools.product(of_one_token, (torch.float32, torch.bfloat16)):
        inputs = project_inputs(case, dtype)
        for got, expected in zip(project_queries_triton(*inputs), project_queries_naive(*inputs), strict=True):
            torch.testing.assert_close(got, expected, **TOL_FP32_SUM)


def check_score_chunks() -> None:
    # As it is served, and in tiles that have few blocks more than the one that overlaps
    configs = (CONFIG, TileConfig(tile_rows=16, programs=0, num_warps=4, num_stages=1))
    for case, dtype, config in itertools.product(CHUNK_CASES, (torch.float32, torch.bfloat16), configs):
        got, expected = chunk_inputs(case, dtype), chunk_inputs(case, dtype)
        score_chunks_triton(*got, config=config)
        score_chunks_naive(*expected)
        torch.testing.assert_close(got.logits, expected.logits, **TOL_CHUNKS, equal_nan=True)


def check_summarise_keys() -> None:
    for case, kind, dtype, gathered in itertools.product(
        SUMMARY_CASES, KINDS, (torch.float32, torch.bfloat16), (False, True)
    ):
        keys, slots, index, block_ids = summary_inputs(case, kind, dtype)
        expected = index.clone()
        summarise_keys_naive(keys, slots, expected, block_ids, kind)
        if gathered:
            summarise_keys_triton(keys[slots], None, index, block_ids, kind)
        else:
            summarise_keys_triton(keys, slots, index, block_ids, kind)
        tolerance = TOL_BF16 if dtype == torch.bfloat16 and kind == "mean" else TOL_FP32
        torch.testing.assert_close(index, expected, **tolerance, equal_nan=True)
    for case in SUMMARY_CASES:
        keys, slots, index, block_ids, scales = make_fp8_inputs(case)
        codes, of_blocks = index.clone(), scales.clone()
        summarise_keys_naive(keys, slots, codes, block_ids, "exact_fp8", of_blocks)
        summarise_keys_triton(keys, slots, index, block_ids, "exact_fp8", scales)
        assert torch.equal(index.view(torch.uint8), codes.view(torch.uint8)), case
        torch.testing.assert_close(scales, of_blocks, **TOL_FP32, equal_nan=True)
    check_every_code()


def check_every_code() -> None:
    """All codes, what lies between two of them, and its neighbours; the largest one makes a scale of 1."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()].sort().values
    ties = (codes[1:] + codes[:-1]) / 2
    values = torch.cat((codes, ties, ties.nextafter(torch.tensor(-500.0)), ties.nextafter(torch.tensor(500.0))))
    keys = torch.nn.functional.pad(values, (0, 1024 - len(values))).view(1, 1, 16, 64)
    index, scales = torch.zeros(keys.shape, dtype=torch.float8_e4m3fn), torch.zeros(1, 1)
    summarise_keys_triton(keys, None, index, torch.zeros(1, dtype=torch.int64), "exact_fp8", scales)
    assert torch.equal(index.view(torch.uint8), keys.to(torch.float8_e4m3fn).view(torch.uint8))
    assert scales.tolist() == [[1.0]]


def check_apply_step() -> None:
    for case in STEP_CASES:
        (packed, counts, lens, got), (*_, expected) = step_inputs(case), step_inputs(case)
        apply_step_triton(packed, counts, lens, got)
        apply_step_naive(packed, counts, lens, expected)
        for name in ("block_ids", "entries", "block_table", "seq_lens", "slot_mapping", "query_row"):
            assert torch.equal(getattr(got, name), getattr(expected, name)), (case, name)


def check_capture_queries() -> None:
    for case, dtype in itertools.product(CAPTURE_CASES, (torch.float32, torch.bfloat16)):
        (query, query_row, got), (*_, expected) = capture_inputs(case, dtype), capture_inputs(case, dtype)
        capture_queries_triton(query, query_row, got)
        capture_queries_naive(query, query_row, expected)
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8)), (case, dtype)


def check_choose_sets() -> None:
    for case, tiles in (*((case, ()) for case in CHOICE_CASES), (WIDE_CASE, (0, 32))):
        got, expected = choice_inputs(case), choice_inputs(case)
        choose_sets_triton(*got, *tiles)
        choose_sets_naive(*expected)
        for name in ("in_set", "short_list", "long_list"):
            assert torch.equal(getattr(got, name), getattr(expected, name)), (case, tiles, name)


def check_forecast_blocks() -> None:
    for case in FORECAST_CASES:
        got, expected = forecast_inputs(case), forecast_inputs(case)
        forecast_blocks_triton(*got)
        forecast_blocks_naive(*expected)
        torch.testing.assert_close(got.memory, expected.memory, **TOL_FP32_SUM, equal_nan=True)


def check_remember_shares() -> None:
    for case in REMEMBER_CASES:
        got, expected = remember_inputs(case), remember_inputs(case)
        remember_shares_triton(*got)
        remember_shares_naive(*expected)
        torch.testing.assert_close(got.memory, expected.memory, **TOL_FP32_SUM, equal_nan=True)


def check_row_lse() -> None:
    for case in LSE_CASES:
        (mass, rows, got), (_, _, expected) = lse_inputs(case), lse_inputs(case)
        row_lse_triton(mass, rows, got)
        row_lse_naive(mass, rows, expected)
        torch.testing.assert_close(got, expected, **TOL_FP32_SUM)


def check_score_rows() -> None:
    # The interpreter would multiply the bit patterns of bfloat16; products of its values are the same in float32.
    del score_rows_kernel.LOW_PRECISION[torch.bfloat16]
    for case, dtype in itertools.product(SCORE_ROWS_CASES, (torch.float16, torch.bfloat16)):
        got, expected = score_rows_inputs(case, dtype), score_rows_inputs(case, dtype)
        score_rows_kernel.score_rows_triton(*got)
        score_rows_naive(*expected)
        scored = got.rows[scored_rows(got.rows)]
        of_rows = (padded_mass(given.mass, scored) for given in (got, expected))
        torch.testing.assert_close(*of_rows, **TOL_FP32_SUM)


CHECKS: dict[str, Callable[[], None]] = {
    "apply_step": check_apply_step,
    "capture_queries": check_capture_queries,
    "checksum_pages": check_checksum_pages,
    "choose_sets": check_choose_sets,
    "copy_pages": check_copy_pages,
    "forecast_blocks": check_forecast_blocks,
    "merge_attention": check_merge_attention,
    "project_queries": check_project_queries,
    "remember_shares": check_remember_shares,
    "row_lse": check_row_lse,
    "score_chunks": check_score_chunks,
    "score_rows": check_score_rows,
    "summarise_keys": check_summarise_keys,
}

if __name__ == "__main__":
    with poisoned_memory():
        for op in sys.argv[1:] or CHECKS:
            report(op, CHECKS[op])
