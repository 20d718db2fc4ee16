"""Compiled Triton kernels against their specification on the same GPU tensors.

Regimes: every case of the ops' `cases.py`, low precision, NaN or poison in what must not be read or written, every
configuration of a kernel that has several, and pinned host memory on either side of a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flashmemory_kernels.apply_step import apply_step
from flashmemory_kernels.apply_step import cases as step_cases
from flashmemory_kernels.apply_step.naive import apply_step_naive
from flashmemory_kernels.capture_queries import capture_queries
from flashmemory_kernels.capture_queries import cases as capture_cases
from flashmemory_kernels.capture_queries.naive import capture_queries_naive
from flashmemory_kernels.checksum_pages import PageSet, store_checksums, verify_checksums
from flashmemory_kernels.checksum_pages import cases as checksum_cases
from flashmemory_kernels.checksum_pages.naive import store_checksums_naive
from flashmemory_kernels.choose_sets import cases as choice_cases
from flashmemory_kernels.choose_sets import choose_sets
from flashmemory_kernels.choose_sets.naive import choose_sets_naive
from flashmemory_kernels.common import TileConfig
from flashmemory_kernels.common.due_rows import padded_mass, scored_rows
from flashmemory_kernels.copy_pages import copy_pages
from flashmemory_kernels.copy_pages.cases import CASES as COPY_CASES
from flashmemory_kernels.copy_pages.cases import CopyCase
from flashmemory_kernels.forecast_blocks import cases as forecast_cases
from flashmemory_kernels.forecast_blocks import forecast_blocks
from flashmemory_kernels.forecast_blocks.naive import forecast_blocks_naive
from flashmemory_kernels.merge_attention import merge_attention
from flashmemory_kernels.merge_attention.cases import CASES as MERGE_CASES
from flashmemory_kernels.merge_attention.cases import MergeCase
from flashmemory_kernels.merge_attention.naive import merge_attention_naive
from flashmemory_kernels.project_queries import cases as project_cases
from flashmemory_kernels.project_queries import project_queries
from flashmemory_kernels.project_queries.naive import project_queries_naive
from flashmemory_kernels.remember_shares import cases as remember_cases
from flashmemory_kernels.remember_shares import remember_shares
from flashmemory_kernels.remember_shares.naive import remember_shares_naive
from flashmemory_kernels.row_lse import cases as lse_cases
from flashmemory_kernels.row_lse import row_lse
from flashmemory_kernels.row_lse.naive import row_lse_naive
from flashmemory_kernels.score_chunks import cases as chunk_cases
from flashmemory_kernels.score_chunks import score_chunks
from flashmemory_kernels.score_chunks.naive import score_chunks_naive
from flashmemory_kernels.score_rows import cases as score_rows_cases
from flashmemory_kernels.score_rows import score_rows
from flashmemory_kernels.score_rows.naive import score_rows_naive
from flashmemory_kernels.summarise_keys import Kind, summarise_keys
from flashmemory_kernels.summarise_keys import cases as summary_cases
from flashmemory_kernels.summarise_keys.naive import summarise_keys_naive

from tests.helpers.poisoned import poisoned_memory
from tests.kernels import far_cases

# exp, log and one division in float32 by two compilers.
TOL_FP32: dict[str, Any] = {"rtol": 3e-6, "atol": 3e-6}
# A sum of products in another order, with a result of about one.
TOL_FP32_SUM: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
# Tensor cores truncate each of up to 16 partial sums: 16 * 2^-18 for sums below 64, times a scale of 0.3.
TOL_TENSOR_CORES: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-5}
# As above, for 16 partial sums below 64 in each of 16 heads, with gates of about one.
TOL_CHUNKS: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-3}
# The same float32 result may round to either neighbour in bf16.
TOL_BF16: dict[str, Any] = {"rtol": 2**-7, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """As in tests/kernels: what a kernel forgets to write is NaN."""
    with poisoned_memory():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", MERGE_CASES)
def test_merge_attention(case: MergeCase, dtype: torch.dtype) -> None:
    outs = torch.randn(2, *case, device="cuda").to(dtype)
    lses = torch.randn(2, case.num_heads, case.num_tokens, device="cuda") * 5
    outs[0, 0], lses[0, :, 0] = torch.nan, -torch.inf
    outs[:, -1], lses[0, :, -1], lses[1, :, -1] = torch.nan, -torch.inf, torch.inf
    got = merge_attention(outs[0], lses[0], outs[1], lses[1])
    expected = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    merge_attention_naive(outs[0], lses[0], outs[1], lses[1], *expected)
    torch.testing.assert_close(got[0], expected[0], **(TOL_FP32 if dtype == torch.float32 else TOL_BF16))
    torch.testing.assert_close(got[1], expected[1], **TOL_FP32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [*project_cases.CASES, *project_cases.BENCH_CASES])
def test_project_queries(case: project_cases.ProjectCase, dtype: torch.dtype) -> None:
    inputs = project_cases.make_inputs(case, dtype, "cuda")
    for got, expected in zip(project_queries(*inputs), project_queries_naive(*inputs), strict=True):
        torch.testing.assert_close(got, expected, **TOL_FP32_SUM)
    assert all(map(torch.equal, project_queries(*inputs), project_queries(*inputs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [*chunk_cases.CASES, *chunk_cases.BENCH_CASES])
def test_score_chunks(case: chunk_cases.ChunkCase, dtype: torch.dtype) -> None:
    got, expected = (chunk_cases.make_inputs(case, dtype, "cuda") for _ in range(2))
    score_chunks(*got)
    score_chunks_naive(*expected)
    torch.testing.assert_close(got.logits, expected.logits, **TOL_CHUNKS, equal_nan=True)


@pytest.mark.parametrize("values", [(16, 0, 4, 1), (64, 0, 4, 1), (256, 0, 8, 1)])
@pytest.mark.parametrize("case", chunk_cases.CASES)
def test_score_chunks_under_any_configuration(case: chunk_cases.ChunkCase, values: tuple[int, int, int, int]) -> None:
    from flashmemory_kernels.score_chunks.kernel import score_chunks_triton

    got, expected = (chunk_cases.make_inputs(case, device="cuda") for _ in range(2))
    score_chunks_triton(*got, config=TileConfig(*values))
    score_chunks_naive(*expected)
    torch.testing.assert_close(got.logits, expected.logits, **TOL_CHUNKS, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", summary_cases.KINDS)
@pytest.mark.parametrize("case", summary_cases.CASES)
def test_summarise_keys(case: summary_cases.SummaryCase, kind: Kind, dtype: torch.dtype) -> None:
    keys, slots, index, block_ids = summary_cases.make_inputs(case, kind, dtype, "cuda")
    expected, gathered = index.clone(), index.clone()
    summarise_keys(keys, slots, index, block_ids, kind)
    summarise_keys(keys[slots], None, gathered, block_ids, kind)
    summarise_keys_naive(keys, slots, expected, block_ids, kind)
    tolerance = TOL_BF16 if dtype == torch.bfloat16 and kind == "mean" else TOL_FP32
    torch.testing.assert_close(index, expected, **tolerance, equal_nan=True)
    torch.testing.assert_close(gathered, index, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", summary_cases.CASES)
def test_summarise_keys_in_fp8(case: summary_cases.SummaryCase, dtype: torch.dtype) -> None:
    keys, slots, index, block_ids, scales = summary_cases.make_fp8_inputs(case, dtype, "cuda")
    # On a CPU, where torch divides by a number: on a GPU it multiplies by one over it
    expected = index.cpu(), scales.cpu()
    summarise_keys(keys, slots, index, block_ids, "exact_fp8", scales)
    summarise_keys_naive(keys.cpu(), slots.cpu(), expected[0], block_ids.cpu(), "exact_fp8", expected[1])
    assert torch.equal(index.view(torch.uint8).cpu(), expected[0].view(torch.uint8))
    torch.testing.assert_close(scales.cpu(), expected[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", [*step_cases.CASES, *step_cases.BENCH_CASES])
def test_apply_step(case: step_cases.StepCase) -> None:
    (packed, counts, lens, got), (*_, expected) = step_cases.make_inputs(case, "cuda"), step_cases.make_inputs(case)
    apply_step(packed, counts, lens, got)
    apply_step_naive(packed.cpu(), counts, lens.cpu(), expected)
    for name in ("block_ids", "entries", "block_table", "seq_lens", "slot_mapping", "query_row"):
        assert torch.equal(getattr(got, name).cpu(), getattr(expected, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [*score_rows_cases.CASES, *score_rows_cases.BENCH_CASES[::3]])
def test_score_rows(case: score_rows_cases.ScoreRowsCase, dtype: torch.dtype) -> None:
    got, expected = (score_rows_cases.make_inputs(case, dtype, "cuda") for _ in range(2))
    score_rows(*got)
    score_rows_naive(*expected)
    scored = got.rows[scored_rows(got.rows)]
    tolerance = TOL_FP32_SUM if dtype == torch.float32 else TOL_TENSOR_CORES
    torch.testing.assert_close(padded_mass(got.mass, scored), padded_mass(expected.mass, scored), **tolerance)


@pytest.mark.parametrize("values", [(16, 0, 4, 1), (64, 1, 4, 2), (128, 2, 8, 3)])
@pytest.mark.parametrize("case", score_rows_cases.CASES)
def test_score_rows_under_any_configuration(
    case: score_rows_cases.ScoreRowsCase, values: tuple[int, int, int, int]
) -> None:
    from flashmemory_kernels.score_rows.kernel import score_rows_triton

    got, expected = (score_rows_cases.make_inputs(case, device="cuda") for _ in range(2))
    score_rows_triton(*got, TileConfig(*values))
    score_rows_naive(*expected)
    scored = got.rows[scored_rows(got.rows)]
    torch.testing.assert_close(padded_mass(got.mass, scored), padded_mass(expected.mass, scored), **TOL_TENSOR_CORES)


@pytest.mark.parametrize("case", [*lse_cases.CASES, *lse_cases.BENCH_CASES])
def test_row_lse(case: lse_cases.LseCase) -> None:
    (mass, rows, got), (_, _, expected) = lse_cases.make_inputs(case, "cuda"), lse_cases.make_inputs(case, "cuda")
    row_lse(mass, rows, got)
    row_lse_naive(mass, rows, expected)
    torch.testing.assert_close(got, expected, **TOL_FP32_SUM)


@pytest.mark.parametrize("case", [*choice_cases.CASES, *choice_cases.BENCH_CASES])
def test_choose_sets(case: choice_cases.ChoiceCase) -> None:
    got, expected = choice_cases.make_inputs(case, "cuda"), choice_cases.make_inputs(case, "cuda")
    choose_sets(*got)
    choose_sets_naive(*expected)
    for name in ("in_set", "short_list", "long_list"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


@pytest.mark.parametrize("tile", [32, 4096])
@pytest.mark.parametrize("case", choice_cases.CASES)
def test_choose_sets_in_tiles(case: choice_cases.ChoiceCase, tile: int) -> None:
    from flashmemory_kernels.choose_sets.kernel import choose_sets_triton

    got, expected = choice_cases.make_inputs(case, "cuda"), choice_cases.make_inputs(case, "cuda")
    choose_sets_triton(*got, single_tile=0, wide_tile=tile)
    choose_sets_naive(*expected)
    for name in ("in_set", "short_list", "long_list"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


@pytest.mark.parametrize("case", [*forecast_cases.CASES, *forecast_cases.BENCH_CASES])
def test_forecast_blocks(case: forecast_cases.ForecastCase) -> None:
    got, expected = forecast_cases.make_inputs(case, "cuda"), forecast_cases.make_inputs(case, "cuda")
    forecast_blocks(*got)
    forecast_blocks_naive(*expected)
    torch.testing.assert_close(got.memory, expected.memory, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("case", [*remember_cases.CASES, *remember_cases.BENCH_CASES])
def test_remember_shares(case: remember_cases.RememberCase) -> None:
    got, expected = remember_cases.make_inputs(case, "cuda"), remember_cases.make_inputs(case, "cuda")
    remember_shares(*got)
    remember_shares_naive(*expected)
    torch.testing.assert_close(got.memory, expected.memory, **TOL_FP32_SUM, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [*capture_cases.CASES, *capture_cases.BENCH_CASES])
def test_capture_queries(case: capture_cases.CaptureCase, dtype: torch.dtype) -> None:
    (query, query_row, got), (*_, expected) = (capture_cases.make_inputs(case, dtype, "cuda") for _ in range(2))
    capture_queries(query, query_row, got)
    capture_queries_naive(query, query_row, expected)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_capture_queries_follows_its_rows_in_a_graph() -> None:
    query, query_row, queries = capture_cases.make_inputs(capture_cases.CASES[2], device="cuda")
    capture_queries(query, query_row, queries)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        capture_queries(query, query_row, queries)
    queries.fill_(torch.nan)
    query_row.copy_(query_row.flip(0))
    expected = queries.clone()
    capture_queries_naive(query, query_row, expected)
    graph.replay()
    torch.testing.assert_close(queries, expected, rtol=0, atol=0, equal_nan=True)


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


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("case", [*checksum_cases.CASES, *checksum_cases.BENCH_CASES[:2]])
def test_checksum_pages(case: checksum_cases.ChecksumCase, pinned: bool) -> None:
    given = checksum_cases.make_inputs(case, torch.bfloat16, "cuda")
    pages, expected = PageSet(given.pages), given.sums.clone()
    store_checksums_naive(pages.words, given.page_ids, expected, given.block_ids)
    store_checksums(pages, given.page_ids, given.sums, given.block_ids)
    assert torch.equal(given.sums, expected)
    mended = [words.clone() for words in pages.words]
    pages.words[-1][given.page_ids[-1], -1] ^= 1
    wrong = torch.empty(case.num_layers, case.num_pages, dtype=torch.uint8, device="cpu" if pinned else "cuda")
    wrong = wrong.pin_memory() if pinned else wrong
    verify_checksums(pages, given.page_ids, given.sums, given.block_ids, wrong)
    torch.cuda.synchronize()
    assert wrong.nonzero().tolist() == [[case.num_layers - 1, case.num_pages - 1]]
    mended[-1][given.page_ids[-1]] = 0
    assert all(map(torch.equal, pages.words, mended))


@pytest.mark.parametrize("op", far_cases.CHECKS)
def test_rows_beyond_two_to_the_31_elements(op: str) -> None:
    try:
        far_cases.CHECKS[op](far_cases.reserve_on_gpu)
    finally:
        torch.cuda.empty_cache()
