"""CpuTransferEngine: every page lands where it belongs and nowhere else; bytes are counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashmemory_vllm.transfer.engine import CpuTransferEngine
from flashmemory_vllm.transfer.host_pool import HostPool
from flashmemory_vllm.transfer.layout import POISON, PageLayout
from tests.unit.transfer.pools import CACHES, NUM_SLOTS, PAGE_BYTES

NUM_BLOCKS = 11
GROUPS = [[0, 1, 3], [2]]


def make_engine(kind: str) -> tuple[CpuTransferEngine, list[torch.Tensor]]:
    """Random device pages over a poisoned host pool."""
    generator = torch.Generator().manual_seed(0)
    caches = CACHES[kind](4)
    for cache in caches:
        cache.copy_(torch.randn(cache.shape, generator=generator))
    layout = PageLayout(caches, GROUPS)
    pool = HostPool(NUM_BLOCKS, layout)
    pool.poison()
    return CpuTransferEngine(layout, pool), caches


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("kind", CACHES)
def test_write_back_then_recall_elsewhere(kind: str, group: int) -> None:
    engine, caches = make_engine(kind)
    before = [cache.clone() for cache in caches]
    blocks, slots = np.array([8, 2, 5], np.int32), np.array([1, 6, 3], np.int32)
    engine.write_back(group, blocks, slots)
    moved = np.array([4, 1, 2], np.int32)
    engine.recall(group, blocks, moved, engine.marker())
    engine.fence([])
    for layer, cache in enumerate(caches):
        expected = before[layer].clone()
        if layer in GROUPS[group]:
            expected[moved] = before[layer][slots]
            untouched = np.setdiff1d(np.arange(NUM_BLOCKS), blocks)
            assert bool(engine.pool.layer_view(layer)[untouched].eq(POISON).all())
        else:
            assert bool(engine.pool.layer_view(layer).eq(POISON).all())
        assert torch.equal(cache, expected)
    group_bytes = len(GROUPS[group]) * PAGE_BYTES
    assert engine.counters.bytes_h2d == engine.counters.bytes_d2h == 3 * group_bytes


@pytest.mark.parametrize("kind", CACHES)
def test_gather_layer_fills_staging(kind: str) -> None:
    engine, caches = make_engine(kind)
    everything = np.arange(NUM_SLOTS)
    engine.write_back(0, everything + 2, everything)
    staging = torch.full((6, PAGE_BYTES), POISON, dtype=torch.uint8)
    blocks = np.array([7, 3, 4], np.int32)
    engine.wait(engine.gather_layer(3, engine.upload(blocks), blocks, staging, engine.marker()))
    assert torch.equal(engine.layout.unflatten(3, staging[:3]), caches[3][[5, 1, 2]])
    assert bool(staging[3:].eq(POISON).all())
    assert (engine.counters.bytes_streamed, engine.counters.bytes_h2d) == (3 * PAGE_BYTES, 0)


def test_no_copies_are_fine() -> None:
    engine, _ = make_engine("block_outermost")
    nothing = np.array([], np.int32)
    engine.recall(0, nothing, nothing, engine.marker())
    engine.write_back(1, nothing, nothing)
    engine.synchronize()
    assert (engine.counters.bytes_h2d, engine.counters.bytes_d2h, engine.counters.late_fences) == (0, 0, 0)
