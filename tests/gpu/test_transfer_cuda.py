"""CudaTransferEngine on a GPU: bits survive the round trip, and copies are ordered where they must be, only there.

Regimes: copies issued while the compute stream is still busy writing the slots they read, a recall and a gather
right behind the write-back of the same block, slots that are overwritten while a write-back reads them, merged
and per-layer runs, low-precision pages; each by the copy engines and by the copy kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from flashmemory_kernels.copy_pages import copy_pages

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.residency.types import Copies
from flashmemory_vllm.transfer import cuda_engine
from flashmemory_vllm.transfer.batched_copy import batched_copy, has_batched_copy
from flashmemory_vllm.transfer.cuda_engine import CudaTransferEngine
from flashmemory_vllm.transfer.host_pool import HostPool
from flashmemory_vllm.transfer.layout import POISON, PageLayout

LAYERS, SLOTS, BLOCKS, HEADS, BLOCK_SIZE, HEAD_DIM = 3, 16, 64, 2, 16, 64
PAGE_ELEMS = HEADS * BLOCK_SIZE * 2 * HEAD_DIM
# About a second: what waits for it is seen to.
LONG_CYCLES = 1_500_000_000


@pytest.fixture(params=["dma", "kernel"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How pages are copied."""
    if request.param == "dma" and not has_batched_copy():
        pytest.skip("this driver has no batched copy")
    monkeypatch.setattr(cuda_engine, "MIN_DMA_PAGE_BYTES", 0 if request.param == "dma" else 1 << 40)
    return str(request.param)


def make_caches(block_outermost: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    """Per layer [S, Hkv, block_size, 2 * D]."""
    if block_outermost:
        caches = torch.zeros(SLOTS, LAYERS, BLOCK_SIZE, HEADS, 2 * HEAD_DIM, dtype=dtype, device="cuda")
        return list(caches.permute(1, 0, 3, 2, 4))
    return list(torch.zeros(LAYERS, SLOTS, HEADS, BLOCK_SIZE, 2 * HEAD_DIM, dtype=dtype, device="cuda"))


@contextmanager
def engine_over(caches: list[torch.Tensor]) -> Iterator[CudaTransferEngine]:
    """An engine with a poisoned pool, whose copy kernel is compiled: that outlasts any busy device."""
    layout = PageLayout(caches)
    pool = HostPool(BLOCKS, layout, pin=True)
    pool.poison()
    engine = CudaTransferEngine(layout, pool)
    # Pinned memory for ids: to allocate it while a copy is under way would wait for that copy.
    ready = [torch.empty(words, dtype=torch.int64, pin_memory=True) for words in (1, 2, 4) for _ in range(8)]
    del ready
    before = [cache.clone() for cache in caches]
    engine.recall(0, ids(0), ids(0), engine.marker())
    engine.gather_layer(0, engine.upload(ids(0)), ids(0), torch.empty_like(layout.page_view(0)[:1]), None)
    engine.synchronize()
    for cache, content in zip(caches, before, strict=True):
        cache.copy_(content)
    engine.counters.bytes_h2d = engine.counters.bytes_streamed = 0
    torch.cuda.synchronize()
    try:
        yield engine
    finally:
        torch.cuda.synchronize()
        pool.close()


def ids(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(numbers, np.int32)


def keep_busy() -> torch.Tensor:
    """Enqueue tens of milliseconds of work on the compute stream."""
    product = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        product = product @ product
        product = product / product.norm()
    return product


def floats(pages: torch.Tensor) -> torch.Tensor:
    """Bytes of pages as float32."""
    return pages.view(torch.float32)


def delay(*streams: torch.cuda.Stream) -> None:
    """Keep copy streams from going on for a second."""
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG_CYCLES)  # type: ignore[no-untyped-call]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("block_outermost", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_behind_a_busy_compute_stream(dtype: torch.dtype, block_outermost: bool) -> None:
    caches = make_caches(block_outermost, dtype)
    content = torch.randn(LAYERS, SLOTS, HEADS, BLOCK_SIZE, 2 * HEAD_DIM, device="cuda").to(dtype)
    blocks, slots, moved = ids(40, 3, 17), ids(1, 9, 4), ids(2, 15, 7)
    with engine_over(caches) as engine:
        for _ in range(3):
            busy = keep_busy()
            for cache, fresh in zip(caches, content, strict=True):
                cache.copy_(fresh)
            engine.write_back(0, blocks, slots)
            engine.recall(0, blocks, moved, engine.marker())
            engine.fence([])
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
        assert bool(engine.pool.pages[others].eq(POISON).all())
        assert engine.counters.bytes_d2h == engine.counters.bytes_h2d == 3 * 3 * engine.layout.block_bytes


@pytest.mark.usefixtures("way")
def test_slots_are_saved_before_the_model_or_a_recall_overwrites_them() -> None:
    caches = make_caches(True, torch.float32)
    with engine_over(caches) as engine:
        floats(engine.pool.pages)[5] = 5.0
        for cache in caches:
            cache[1], cache[2] = 1.0, 2.0
        delay(*engine._write_backs)
        engine.write_back(0, ids(11, 12), ids(1, 2))
        engine.recall(0, ids(5), ids(1), engine.marker())
        engine.fence([Copies(0, ids(13), ids(2))])
        for cache in caches:
            cache[2] = 20.0
        seen = [cache[1:3].clone() for cache in caches]
        engine.synchronize()
        assert bool((floats(engine.pool.pages)[11] == 1.0).all())
        assert bool((floats(engine.pool.pages)[12] == 2.0).all())
        for pages in seen:
            assert bool((pages[0] == 5.0).all())
            assert bool((pages[1] == 20.0).all())


@pytest.mark.usefixtures("way")
def test_a_gather_reads_what_a_pending_write_back_writes() -> None:
    caches = make_caches(True, torch.bfloat16)
    staging = torch.full((4, 2 * PAGE_ELEMS), POISON, dtype=torch.uint8, device="cuda")
    with engine_over(caches) as engine:
        caches[1][3], caches[1][4] = 3.0, 4.0
        blocks = ids(8, 9)
        delay(*engine._write_backs)
        engine.write_back(0, blocks, ids(3, 4))
        engine.wait(engine.gather_layer(1, engine.upload(blocks), blocks, staging, None))
        assert staging.view(torch.bfloat16)[:2, 0].tolist() == [3.0, 4.0]
        assert bool(staging[2:].eq(POISON).all())
        assert engine.counters.bytes_streamed == 2 * engine.layout.layer_bytes(1)


@pytest.mark.usefixtures("way")
def test_a_gather_waits_until_its_buffer_is_drained() -> None:
    staging = torch.zeros(1, 4 * PAGE_ELEMS, dtype=torch.uint8, device="cuda")
    with engine_over(make_caches(True, torch.float32)) as engine:
        floats(engine.pool.pages)[7] = 7.0
        busy = keep_busy()
        seen = staging.clone()
        drained = engine.marker()
        engine.wait(engine.gather_layer(0, engine.upload(ids(7)), ids(7), staging, drained))
        assert bool((floats(staging) == 7.0).all())
        assert bool((seen == 0).all())
        assert bool(busy.isfinite().all())


@pytest.mark.usefixtures("way")
def test_neither_a_fence_nor_a_gather_waits_for_write_backs_of_others() -> None:
    """If one did, the write-back would be done once the compute stream is."""
    staging = torch.zeros(1, 4 * PAGE_ELEMS, dtype=torch.uint8, device="cuda")
    with engine_over(make_caches(True, torch.float32)) as engine:
        floats(engine.pool.pages)[7] = 7.0
        delay(*engine._write_backs)
        engine.write_back(0, ids(11), ids(1))
        engine.recall(0, ids(7), ids(3), engine.marker())
        engine.fence([Copies(0, ids(13), ids(2))])
        engine.wait(engine.gather_layer(0, engine.upload(ids(7)), ids(7), staging, engine.marker()))
        torch.cuda.current_stream().synchronize()
        assert len(engine._pending) == 1
        assert bool((floats(staging) == 7.0).all())
        engine.synchronize()
        assert len(engine._pending) == 0


def test_fence_counts_recalls_that_are_not_done() -> None:
    with engine_over(make_caches(True, torch.bfloat16)) as engine:
        engine.fence([])
        assert engine.counters.late_fences == 0
        delay(engine._recalls)
        engine.recall(0, ids(1), ids(1), engine.marker())
        engine.fence([])
        assert engine.counters.late_fences == 0, "how long the device waits is known when it has"
        engine.synchronize()
        torch.cuda.synchronize()
        engine.fence([])
        assert engine.counters.late_fences == 1
        assert 1e-3 < engine.counters.stall_seconds < 10.0


@pytest.mark.parametrize("places", ["host_to_device", "device_to_host"])
@pytest.mark.parametrize("page_elems", [1, 30, 4098])
def test_batched_copy(page_elems: int, places: str) -> None:
    if not has_batched_copy():
        pytest.skip("this driver has no batched copy")
    rows = torch.randn(2, 40, page_elems + 3)
    target = rows[1].clone()
    source_ids, target_ids = (torch.randperm(40)[:25].numpy() for _ in range(2))
    target[target_ids, :page_elems] = rows[0, source_ids, 3:]
    kinds = [torch.Tensor.cuda if place == "device" else torch.Tensor.pin_memory for place in places.split("_to_")]
    source, got = kinds[0](rows[0]), kinds[1](rows[1])
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    batched_copy(source[:, 3:], source_ids, got[:, :page_elems], target_ids, stream)
    torch.cuda.synchronize()
    assert torch.equal(got.cpu(), target)


def test_pageable_host_memory_is_refused() -> None:
    layout = PageLayout(make_caches(True, torch.float32))
    with pytest.raises(ConfigError, match="needs a pinned host pool"):
        CudaTransferEngine(layout, HostPool(2, layout))
    pages, numbers = layout.page_view(0), torch.zeros(1, dtype=torch.int64, device="cuda")
    with pytest.raises(ValueError, match="source: expected pinned host memory"):
        copy_pages(torch.zeros(2, 4 * PAGE_ELEMS, dtype=torch.uint8), numbers, pages, numbers)
