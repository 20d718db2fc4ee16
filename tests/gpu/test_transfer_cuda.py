"""CudaTransferEngine on a GPU: bits survive the round trip, copies are ordered, gathers can stream attention.

Regimes: copies issued while the compute stream is still busy writing the slots they read (ordering by
    events), a
recall right behind the write-back of the same block, merged and per-layer runs, low-precision pages.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flashmemory_kernels.copy_pages import copy_pages

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.transfer.cuda_engine import CudaTransferEngine
from flashmemory_vllm.transfer.host_pool import HostPool
from flashmemory_vllm.transfer.layout import PageLayout
from flashmemory_vllm.transfer.page_format import InterleavedPages
from flashmemory_vllm.transfer.streaming import PagedHistory, stream_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LAYERS, SLOTS, BLOCKS, HEADS, BLOCK_SIZE, HEAD_DIM = 3, 16, 64, 2, 16, 64
PAGE_ELEMS = HEADS * BLOCK_SIZE * 2 * HEAD_DIM


def make_caches(block_outermost: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    """Per layer [S, Hkv, block_size, 2 * D]."""
    if block_outermost:
        caches = torch.zeros(SLOTS, LAYERS, BLOCK_SIZE, HEADS, 2 * HEAD_DIM, dtype=dtype, device="cuda")
        return list(caches.permute(1, 0, 3, 2, 4))
    return list(torch.zeros(LAYERS, SLOTS, HEADS, BLOCK_SIZE, 2 * HEAD_DIM, dtype=dtype, device="cuda"))


def make_engine(caches: list[torch.Tensor]) -> CudaTransferEngine:
    layout = PageLayout(caches)
    pool = HostPool(BLOCKS, layout, pin=True)
    pool.poison()
    return CudaTransferEngine(layout, pool)


def keep_busy() -> torch.Tensor:
    """Enqueue tens of milliseconds of work on the compute stream."""
    product = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        product = product @ product
        product = product / product.norm()
    return product


@pytest.mark.parametrize("block_outermost", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_behind_a_busy_compute_stream(dtype: torch.dtype, block_outermost: bool) -> None:
    caches = make_caches(block_outermost, dtype)
    engine = make_engine(caches)
    content = torch.randn(LAYERS, SLOTS, HEADS, BLOCK_SIZE, 2 * HEAD_DIM, device="cuda").to(dtype)
    blocks, slots = np.array([40, 3, 17], np.int32), np.array([1, 9, 4], np.int32)
    moved = np.array([2, 15, 7], np.int32)
    for _ in range(3):
        busy = keep_busy()
        for cache, fresh in zip(caches, content, strict=True):
            cache.copy_(fresh)
        engine.write_back(0, blocks, slots)
        engine.recall(0, blocks, moved)
        engine.fence()
        # Reads after the fence see the recalled pages, without the host ever waiting.
        for cache, fresh in zip(caches, content, strict=True):
            expected = fresh.clone()
            expected[moved] = fresh[slots]
            assert torch.equal(cache.view(torch.uint8), expected.view(torch.uint8))
        assert bool(busy.isfinite().all())
    engine.synchronize()
    written = engine.pool.layer_view(1)[blocks]
    assert torch.equal(engine.layout.unflatten(1, written), content[1].cpu()[slots])
    others = np.setdiff1d(np.arange(BLOCKS), blocks)
    assert bool(engine.pool.pages[others].isnan().all())
    assert engine.counters.bytes_d2h == engine.counters.bytes_h2d == 3 * 3 * engine.layout.block_bytes
    engine.pool.close()


def test_fence_counts_copies_that_are_not_done() -> None:
    engine = make_engine(make_caches(True, torch.bfloat16))
    engine.recall(0, np.array([1]), np.array([1]))  # compiles the copy kernel, which outlasts any busy device
    engine.synchronize()
    engine.fence()
    assert engine.counters.late_fences == 0
    keep_busy()
    engine.recall(0, np.array([1]), np.array([1]))
    engine.fence()
    assert engine.counters.late_fences == 1
    engine.synchronize()
    engine.fence()
    assert engine.counters.late_fences == 1
    engine.pool.close()


@pytest.mark.parametrize("num_history", [5, 16, 400, 1000])
def test_streamed_attention_is_dense(num_history: int) -> None:
    caches = make_caches(True, torch.float32)
    engine = make_engine(caches)
    generator = torch.Generator().manual_seed(num_history)
    query = torch.randn(40, 4, HEAD_DIM, generator=generator)
    keys, values = torch.randn(2, num_history + 40, HEADS, HEAD_DIM, generator=generator)
    num_full, num_tail = divmod(num_history, BLOCK_SIZE)
    ids = torch.randperm(BLOCKS, generator=generator)[:num_full]
    tokens = torch.cat((keys, values), dim=-1)
    for position, block in enumerate(ids.tolist()):
        page = engine.layout.unflatten(1, engine.pool.layer_view(1)[block : block + 1])
        page[0] = tokens[position * BLOCK_SIZE : (position + 1) * BLOCK_SIZE].transpose(0, 1)
    if num_tail:
        caches[1][3, :, :num_tail] = tokens[num_history - num_tail : num_history].transpose(0, 1).cuda()
    tail = torch.tensor([3], device="cuda") if num_tail else None
    page_format = InterleavedPages(HEADS, BLOCK_SIZE, HEAD_DIM)
    history = PagedHistory(engine, page_format, 1, ids.cuda(), num_history, tail)
    staging = torch.full((2, 4, PAGE_ELEMS), torch.nan, device="cuda")

    own_keys, own_values = keys[num_history:].cuda(), values[num_history:].cuda()
    out = stream_attention(query.cuda(), own_keys, own_values, history, 0.2, (staging[0], staging[1]))

    wide_keys, wide_values = (x.double().repeat_interleave(2, dim=1) for x in (keys, values))
    logits = torch.einsum("thd,shd->hts", query.double(), wide_keys) * 0.2
    logits += torch.full(logits.shape[1:], -torch.inf, dtype=torch.float64).triu(num_history + 1)
    expected = torch.einsum("hts,shd->thd", logits.softmax(-1), wide_values)
    # float32 parts and merges against float64.
    assert (out.cpu() - expected).abs().max() / expected.abs().max() < 1e-5
    engine.pool.close()


def test_pageable_host_memory_is_refused() -> None:
    layout = PageLayout(make_caches(True, torch.float32))
    with pytest.raises(ConfigError, match="needs a pinned host pool"):
        CudaTransferEngine(layout, HostPool(2, layout))
    pages, ids = layout.page_view(0), torch.zeros(1, dtype=torch.int64, device="cuda")
    with pytest.raises(ValueError, match="source: expected pinned host memory"):
        copy_pages(torch.zeros(2, PAGE_ELEMS), ids, pages, ids)
