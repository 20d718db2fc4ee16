"""Each kernel on rows that lie more than 2^31 elements into a tensor; `python far_cases.py [OP...]` interprets them.

Only the pages that are touched exist. An op whose tensors must be contiguous is not here (`project_queries`): it would
have to compute all of those elements.
"""

import functools
import mmap
import os
import sys
from collections.abc import Callable

import torch
from flashmemory_kernels.apply_step import PlaceTables
from flashmemory_kernels.apply_step.cases import pack
from flashmemory_kernels.apply_step.kernel import apply_step_triton
from flashmemory_kernels.capture_queries.kernel import capture_queries_triton
from flashmemory_kernels.checksum_pages import PageSet
from flashmemory_kernels.checksum_pages.kernel import store_checksums_triton, verify_checksums_triton
from flashmemory_kernels.checksum_pages.naive import page_sums
from flashmemory_kernels.choose_sets import ChoicePolicy
from flashmemory_kernels.choose_sets.kernel import choose_sets_triton
from flashmemory_kernels.common.due_rows import Due, make_rows
from flashmemory_kernels.copy_pages.kernel import copy_pages_triton
from flashmemory_kernels.forecast_blocks import Head
from flashmemory_kernels.forecast_blocks.kernel import forecast_blocks_triton
from flashmemory_kernels.forecast_blocks.naive import forecast_blocks_naive
from flashmemory_kernels.merge_attention.kernel import merge_attention_triton
from flashmemory_kernels.merge_attention.naive import merge_attention_naive
from flashmemory_kernels.remember_shares import Channel, Channels
from flashmemory_kernels.remember_shares.kernel import remember_shares_triton
from flashmemory_kernels.row_lse.kernel import row_lse_triton
from flashmemory_kernels.score_chunks import CODE_DTYPE, Ensemble, quantise_codes
from flashmemory_kernels.score_chunks.kernel import score_chunks_triton
from flashmemory_kernels.score_chunks.naive import score_chunks_naive
from flashmemory_kernels.score_rows.kernel import score_rows_triton
from flashmemory_kernels.score_rows.naive import score_rows_naive
from flashmemory_kernels.summarise_keys.kernel import summarise_keys_triton

from tests.helpers.reports import report

FAR = 1 << 31
# Rows so far apart that an int32 holds the distance, but not its product with the number of a row.
STRIDE, ROW = 1 << 20, (1 << 11) + 3

# Of Linux, which Python's mmap names from 3.13 on only: the size is not held against what the machine has.
MAP_NORESERVE = 0x4000

Reserve = Callable[[int, torch.dtype], torch.Tensor]


def reserve_on_cpu(num_elems: int, dtype: torch.dtype) -> torch.Tensor:
    """Address space without memory behind it."""
    num_bytes = num_elems * dtype.itemsize
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype)


def reserve_on_gpu(num_elems: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory of the GPU."""
    return torch.empty(num_elems, dtype=dtype, device="cuda")


def far_rows(reserve: Reserve, dtype: torch.dtype, num_elems: int) -> torch.Tensor:
    """Rows [ROW + 1, num_elems] of which the last ones lie past FAR."""
    return reserve(ROW * STRIDE + num_elems, dtype).as_strided((ROW + 1, num_elems), (STRIDE, 1))


def check_copy_pages(reserve: Reserve) -> None:
    pool = far_rows(reserve, torch.float32, 1024)
    device = pool.device
    ids, near = torch.tensor([ROW, 1, ROW - 1], device=device), torch.arange(3, device=device)
    content = torch.randn(3, 1024, device=device)
    copy_pages_triton(content, near, pool, ids)
    assert torch.equal(pool[ids], content)
    back = torch.zeros_like(content)
    copy_pages_triton(pool, ids, back, None)
    assert torch.equal(back, content)


def check_checksum_pages(reserve: Reserve) -> None:
    pool = far_rows(reserve, torch.float32, 1024)
    device = pool.device
    ids, blocks = torch.tensor([ROW, 1], device=device), torch.tensor([ROW, 2], device=device)
    pool[ids] = torch.randn(2, 1024, device=device)
    pages = PageSet([pool, pool])
    sums = reserve(FAR + 3 * ROW, torch.int64).as_strided((2, ROW + 1), (FAR + ROW, 1))
    sums[:, blocks] = 0
    where = (pages.addresses, pages.stride_words, pages.num_words)
    store_checksums_triton(*where, ids, sums, blocks)
    assert torch.equal(sums[:, blocks], page_sums(pool[ids].view(torch.int32)).expand(2, 2))
    wrong = torch.full((2, 2), 7, dtype=torch.uint8, device=device)
    verify_checksums_triton(*where, ids, sums, blocks, wrong)
    assert not wrong.any()
    pool[ROW, 1000] += 1
    verify_checksums_triton(*where, ids, sums, blocks, wrong)
    assert wrong.tolist() == [[1, 0], [1, 0]]


def check_summarise_keys(reserve: Reserve) -> None:
    keys = far_rows(reserve, torch.float32, 32).view(ROW + 1, 1, 4, 8)
    index = far_rows(reserve, torch.float32, 16).view(ROW + 1, 1, 1, 16)
    slots, ids = (torch.tensor([ROW, 1], device=keys.device), torch.tensor([2, ROW], device=keys.device))
    keys[slots] = torch.randn(2, 1, 4, 8, device=keys.device)
    summarise_keys_triton(keys, slots, index, ids, "bounds")
    expected = torch.cat((keys[slots].amin(2, keepdim=True), keys[slots].amax(2, keepdim=True)), dim=-1)
    assert torch.equal(index[ids], expected)


def check_score_chunks(reserve: Reserve) -> None:
    """Codes, scales, heads, gates, ids and logits lie far apart, each by layer, block, row, place or group."""
    codes = reserve(FAR + (ROW + 1) * STRIDE, torch.uint8).as_strided((2, ROW + 1, 2, 16), (FAR, STRIDE, 16, 1))
    scales = reserve(FAR + (ROW + 1) * STRIDE, torch.float32).as_strided((2, ROW + 1, 2), (FAR, STRIDE, 1))
    ids, device = far_rows(reserve, torch.int32, 3), codes.device
    ids[ROW] = torch.tensor([ROW, 1, ROW - 1], device=device)
    near_codes, near_scales = quantise_codes(torch.randn(2, 3, 2, 16, device=device))
    codes[:, ids[ROW].long()], scales[:, ids[ROW].long()] = near_codes.view(torch.uint8), near_scales
    memory = reserve(3 * FAR + 64, torch.float32)
    heads = memory.as_strided((2, 1, 2, 4, 16), (2 * FAR, 0, FAR, 16, 1))
    gates = reserve(3 * FAR + 4, torch.float32).as_strided((2, 1, 2, 4), (2 * FAR, 0, FAR, 1))
    heads[1], gates[1] = torch.randn(1, 2, 4, 16, device=device), torch.randn(1, 2, 4, device=device)
    groups = torch.tensor([0, 1], dtype=torch.int32, device=device)
    weights = torch.randn(2, device=device), torch.randn(2, device=device), torch.randn(2, 1, device=device)
    ensemble, fields = Ensemble(*weights, groups, "max"), {Due.NUM_BLOCKS: 3, Due.NUM_QUERIES: 1}
    logits = reserve(FAR + (ROW + 1) * STRIDE, torch.float32).as_strided((2, ROW + 1, 3), (FAR, STRIDE, 1))
    rows = make_rows([{}, {**fields, Due.PLACE: ROW}], 2, tile=1).to(device)
    score_chunks_triton(heads, gates, codes.view(torch.float8_e4m3fn), scales, ids, rows, ensemble, logits)
    expected, near_ids = torch.zeros(2, 1, 3, device=device), torch.arange(3, dtype=torch.int32, device=device)[None]
    near = heads[1:].contiguous(), gates[1:].contiguous(), near_codes, near_scales, near_ids
    score_chunks_naive(*near, make_rows([fields], 1, tile=1).to(device), ensemble, expected)
    torch.testing.assert_close(logits[:, ROW], expected[:, 0], rtol=1e-4, atol=1e-3)


def check_merge_attention(reserve: Reserve) -> None:
    apart = FAR // 2 + 64
    outs = [reserve(2 * apart + 64, torch.float32).as_strided((3, 2, 16), (apart, 16, 1)) for _ in range(2)]
    lses = [reserve(FAR + 8, torch.float32).as_strided((2, 3), (FAR, 1)) for _ in range(2)]
    for tensor in (*outs, *lses):
        tensor.copy_(torch.randn(tensor.shape))
    expected = merge_attention_naive(outs[0].clone(), lses[0].clone(), outs[1].clone(), lses[1].clone())
    got = merge_attention_triton(outs[0], lses[0], outs[1], lses[1], outs[0], lses[0])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=3e-6, atol=3e-6)


def check_capture_queries(reserve: Reserve) -> None:
    queries = far_rows(reserve, torch.float32, 32).view(ROW + 1, 2, 16)
    query = far_rows(reserve, torch.float32, 32).view(ROW + 1, 2, 16)
    device = query.device
    rows = torch.full((ROW + 1,), -1, dtype=torch.int32, device=device)
    rows[ROW], rows[1] = 2, ROW
    query[rows >= 0] = content = torch.randn(2, 2, 16, device=device)
    capture_queries_triton(query, rows, queries)
    assert torch.equal(queries[[ROW, 2]], content)


def check_apply_step(reserve: Reserve) -> None:
    width, device = STRIDE, reserve(1, torch.int32).device
    entries = reserve((ROW + 1) * width, torch.int32).view(1, ROW + 1, width)
    ids = reserve((ROW + 1) * width, torch.int32).view(ROW + 1, width)
    block_table = reserve((ROW + 1) * width, torch.int32).view(1, ROW + 1, width)
    slots = torch.zeros(1, 2, dtype=torch.int64, device=device)
    lens, query_row = slots.new_zeros(1, ROW + 1, dtype=torch.int32), slots.new_zeros(2, dtype=torch.int32)
    tables = PlaceTables(ids, entries, block_table, lens, slots, query_row, block_size=16, num_kept=4)
    rows = [(-1, 0, 0, 0)] * (ROW - 1) + [(ROW, 0, 1, 0), (1, 1, 1, 0)]
    runs = [(ROW, 0, (7, 8)), (ROW + 1 + ROW, 5, (9,))]
    packed, counts = pack(rows, runs, [(1, 0, 6), (ROW + 1 + 1, 3, 4)], num_tokens=2)
    logical = torch.zeros(ROW + 1, dtype=torch.int32)
    logical[-2], logical[-1] = 20, 3
    apply_step_triton(packed.to(device), counts, logical.to(device), tables)
    assert ids[ROW, 5] == 9
    assert ids[1, 3] == 4
    assert block_table[0, ROW - 1, :2].tolist() == [7, 8]
    assert block_table[0, ROW, 0] == 6
    assert slots.tolist() == [[8 * 16 + 3, 6 * 16 + 2]]
    assert query_row.tolist() == [4 * ROW + 3, 4 + 2]


def check_choose_sets(reserve: Reserve) -> None:
    """Channels, groups and places all lie far apart."""
    memory = reserve(3 * FAR + ROW * STRIDE + 8, torch.float32)
    memory = memory.as_strided((2, 2, ROW + 1, 8), (2 * FAR, FAR, STRIDE, 1))
    in_set = reserve(FAR + ROW * STRIDE + 8, torch.int8).as_strided((2, ROW + 1, 8), (FAR, STRIDE, 1))
    device = memory.device
    in_set[:, ROW] = torch.tensor([1, 0, 0, 0, 0, 1, 0, 1], dtype=torch.int8, device=device)
    memory[:, :, ROW] = torch.tensor([0.0, 0.1, 0.3, 0.2, 0.1, 0.4, 0.0, 0.0], device=device)
    memory[1, 1, ROW, 4] = 1.0
    fields = {Due.PLACE: ROW, Due.NUM_BLOCKS: 8, Due.FIRST_RECENT: 6, Due.END: 8, Due.WANT: 2, Due.CAP: 8}
    rows = make_rows([{**fields, Due.LONG_START: -1}], 1, tile=1).to(device)
    for tiles in ((8, 8), (0, 4)):
        of_place = in_set[:, ROW].clone()
        short, long = torch.zeros(1, 2, 10, dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int32)
        weights = torch.ones(2, device=device)
        choose_sets_triton(memory, in_set, rows, weights, ChoicePolicy(), short, long.to(device), *tiles)
        assert short[0, :, 3:].tolist() == [[1, 1, 6, 2, 0, 0, 0], [1, 1, 6, 4, 0, 0, 0]]
        assert in_set[:, ROW].tolist() == [[0, 0, 1, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]]
        in_set[:, ROW] = of_place


def check_remember_shares(reserve: Reserve) -> None:
    memory = reserve(3 * FAR + ROW * STRIDE + 4, torch.float32)
    memory = memory.as_strided((2, 2, ROW + 1, 4), (2 * FAR, FAR, STRIDE, 1))
    device = memory.device
    # So many queries that the second tile begins at FAR.
    num_kept = FAR // 256
    mass = reserve(2 * FAR, torch.float32).view(2, 2, num_kept, 128)
    lse = reserve(4 * num_kept, torch.float32).view(2, 2, num_kept)
    mass[1, :, :2] = torch.arange(4.0, device=device).view(2, 2, 1)
    lse[1, :, :2] = 4.0
    fields = {Due.NUM_BLOCKS: 4, Due.NUM_QUERIES: 2, Due.ELAPSED: 1}
    rows = make_rows([fields, {**fields, Due.PLACE: ROW, Due.NUM_KNOWN: 1}], 2, tile=128)
    memory[:, :, ROW] = 0.8
    groups = torch.tensor([0, 1], dtype=torch.int32, device=device)
    channels = Channels.of((Channel(0.5), Channel(0.25)), device)
    remember_shares_triton(mass, lse, rows.to(device), groups, channels, memory)
    shares = torch.arange(-4.0, 0.0, device=device).exp().view(2, 2)
    for channel, decay in enumerate((0.5, 0.25)):
        expected = torch.maximum(shares[:, 0], shares[:, 1] * decay).unsqueeze(1).repeat(1, 4)
        expected[:, 0].clamp_(min=0.8 * decay)
        torch.testing.assert_close(memory[channel, :, ROW], expected, rtol=1e-5, atol=1e-6)


def check_forecast_blocks(reserve: Reserve) -> None:
    memory = reserve(4 * FAR + ROW * STRIDE + 4, torch.float32)
    memory = memory.as_strided((4, 1, ROW + 1, 4), (FAR, FAR, STRIDE, 1))
    device = memory.device
    near = torch.rand(4, 1, 2, 4, device=device)
    memory[:, :, ROW] = near[:, :, 1]
    weights = (torch.rand(shape, device=device) for shape in ((9, 2), (2,), (2,), (9,), (1,), (2,), (1,)))
    head, fields = Head(*weights), {Due.NUM_BLOCKS: 4, Due.NUM_QUERIES: 1, Due.NUM_KNOWN: 4}
    forecast_blocks_triton(memory, make_rows([{**fields, Due.PLACE: ROW}], 1, tile=1).to(device), head, 16)
    forecast_blocks_naive(near, make_rows([{**fields, Due.PLACE: 1}], 1, tile=1).to(device), head, 16)
    torch.testing.assert_close(memory[3, 0, ROW], near[3, 0, 1], rtol=1e-5, atol=1e-6)


def check_row_lse(reserve: Reserve) -> None:
    num_tiles = FAR // 32 + 1
    mass = reserve(num_tiles * 32, torch.float32).view(num_tiles, 2, 1, 16)
    mass[-1] = torch.randn(2, 1, 16, device=mass.device)
    rows = make_rows([{Due.NUM_BLOCKS: 9, Due.NUM_QUERIES: 1}], 1, tile=16)
    rows[:, Due.FIRST_TILE] = num_tiles - 1
    lse = torch.zeros(1, 2, 1, device=mass.device)
    row_lse_triton(mass, rows.to(mass.device), lse)
    torch.testing.assert_close(lse[0], mass[-1, :, :, :9].logsumexp(2), rtol=1e-5, atol=1e-5)


def check_score_rows(reserve: Reserve) -> None:
    """Index, queries and ids lie far apart, each by layer, block or place."""
    memory = reserve(FAR + (ROW + 1) * STRIDE, torch.float32)
    index, device = memory.as_strided((2, ROW + 1, 2, 1, 16), (FAR, STRIDE, 16, 16, 1)), memory.device
    blocks = torch.tensor([ROW, 1, ROW - 1], device=device)
    index[:, blocks] = torch.randn(2, 3, 2, 1, 16, device=device)
    _check_scored(reserve, index, None, blocks)
    # The same in fp8
    codes = reserve(FAR + (ROW + 1) * STRIDE, torch.uint8).as_strided(index.shape, index.stride())
    scales = reserve(FAR + (ROW + 1) * STRIDE, torch.float32).as_strided((2, ROW + 1, 2), (FAR, STRIDE, 1))
    of_blocks, scales[:, blocks] = quantise_codes(index[:, blocks].flatten(3))
    codes[:, blocks] = of_blocks.view(2, 3, 2, 1, 16).view(torch.uint8)
    _check_scored(reserve, codes.view(CODE_DTYPE), scales, blocks)


def _check_scored(reserve: Reserve, index: torch.Tensor, scales: torch.Tensor | None, blocks: torch.Tensor) -> None:
    device, ids = index.device, far_rows(reserve, torch.int32, 3)
    ids[ROW] = blocks
    queries = reserve(FAR + (ROW + 1) * STRIDE, torch.float32)
    queries = queries.as_strided((2, ROW + 1, 2, 4, 16), (FAR, STRIDE, 64, 16, 1))
    queries[:, ROW] = torch.randn(2, 2, 4, 16, device=device)
    rows = make_rows(
        [{Due.PLACE: ROW, Due.POSITION: 5, Due.NUM_QUERIES: 2, Due.NUM_BLOCKS: 3}], 1, tile=16
    )  # fmt: skip
    got, expected = torch.zeros(2, 1, 8, 2, 16, device=device)
    score_rows_triton(queries, index, scales, ids, rows.to(device), 0.3, got)
    near = index.view(torch.uint8)[:, blocks].contiguous().view(index.dtype)
    near_scales = None if scales is None else scales[:, blocks].contiguous()
    rows[0, Due.PLACE] = 0
    near_ids = torch.arange(3, dtype=torch.int32, device=device).unsqueeze(0)
    score_rows_naive(queries[:, ROW:].contiguous(), near, near_scales, near_ids, rows.to(device), 0.3, expected)
    torch.testing.assert_close(got[..., :3], expected[..., :3], rtol=1e-5, atol=1e-5)


CHECKS: dict[str, Callable[[Reserve], None]] = {
    "apply_step": check_apply_step,
    "capture_queries": check_capture_queries,
    "checksum_pages": check_checksum_pages,
    "choose_sets": check_choose_sets,
    "copy_pages": check_copy_pages,
    "forecast_blocks": check_forecast_blocks,
    "merge_attention": check_merge_attention,
    "remember_shares": check_remember_shares,
    "row_lse": check_row_lse,
    "score_chunks": check_score_chunks,
    "score_rows": check_score_rows,
    "summarise_keys": check_summarise_keys,
}

if __name__ == "__main__":
    assert os.environ["TRITON_INTERPRET"] == "1"
    for op in sys.argv[1:] or CHECKS:
        torch.manual_seed(0)
        report(op, functools.partial(CHECKS[op], reserve_on_cpu))
