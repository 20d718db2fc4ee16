"""PageLayout: which pages merge into one copy, and what is refused."""

from __future__ import annotations

import pytest
import torch

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.transfer.layout import PageLayout
from tests.unit.transfer.pools import (
    BLOCK_SIZE,
    CACHES,
    HEAD_DIM,
    NUM_HEADS,
    NUM_SLOTS,
    PAGE_BYTES,
    PAGE_ELEMS,
    MakeCaches,
    block_outermost,
    layer_outermost,
)


@pytest.mark.parametrize("caches", CACHES.values(), ids=CACHES)
def test_bytes(caches: MakeCaches) -> None:
    layout = PageLayout(caches(3, torch.bfloat16))
    assert (layout.num_layers, layout.num_slots) == (3, NUM_SLOTS)
    assert layout.layer_bytes(1) == PAGE_ELEMS * 2
    assert layout.block_bytes == 3 * PAGE_ELEMS * 2


def test_block_outermost_layers_move_in_one_copy() -> None:
    (run,) = PageLayout(block_outermost(3)).runs(0)
    assert (run.layers, run.host_start, run.num_bytes) == ((0, 1, 2), 0, 3 * PAGE_BYTES)


def test_layer_outermost_layers_move_one_by_one() -> None:
    runs = PageLayout(layer_outermost(3)).runs(0)
    assert [(run.layers, run.host_start) for run in runs] == [
        ((0,), 0),
        ((1,), PAGE_BYTES),
        ((2,), 2 * PAGE_BYTES),
    ]


def test_groups_split_runs_and_order_the_host_row() -> None:
    layout = PageLayout(block_outermost(5), groups=[[1, 2, 4], [0, 3]])
    assert [[run.layers for run in layout.runs(group)] for group in (0, 1)] == [[(1, 2), (4,)], [(0,), (3,)]]
    starts = [layout.host_range(layer).start // PAGE_BYTES for layer in range(5)]
    assert starts == [3, 0, 1, 4, 2]


@pytest.mark.parametrize("caches", CACHES.values(), ids=CACHES)
def test_page_view_is_the_cache_in_memory_order(caches: MakeCaches) -> None:
    tensors = caches(2)
    for cache in tensors:
        cache.copy_(torch.randn(cache.shape))
    layout = PageLayout(tensors)
    view = layout.page_view(1)
    assert (view.shape, view.dtype) == ((NUM_SLOTS, PAGE_BYTES), torch.uint8)
    assert view.data_ptr() == tensors[1].data_ptr()
    # A staging copy of pages 5 and 2 reads like the cache itself.
    staged = layout.unflatten(1, view[[5, 2]])
    assert torch.equal(staged, tensors[1][[5, 2]])


def test_layers_may_differ_in_dtype_and_page_size() -> None:
    caches = [*block_outermost(2, torch.bfloat16), torch.randn(NUM_SLOTS, 3, 5), *block_outermost(1)]
    layout = PageLayout(caches, groups=[[0, 2], [1, 3]])
    assert [layout.layer_bytes(layer) for layer in range(4)] == [PAGE_ELEMS * 2, PAGE_ELEMS * 2, 60, PAGE_BYTES]
    assert layout.block_bytes == 2 * PAGE_ELEMS * 2 + 60 + PAGE_BYTES
    assert layout.host_range(1) == slice(PAGE_ELEMS * 2 + 60, 2 * PAGE_ELEMS * 2 + 60)
    for layer, cache in enumerate(caches):
        staged = layout.unflatten(layer, layout.page_view(layer)[[5, 2]])
        assert staged.dtype == cache.dtype
        assert torch.equal(staged, cache[[5, 2]])


def test_one_slot_apart_is_not_adjacent() -> None:
    """Layer-outermost with a single slot touches without being a run of one row."""
    caches = list(torch.zeros(2, 1, NUM_HEADS, BLOCK_SIZE, 2 * HEAD_DIM))
    assert len(PageLayout(caches).runs(0)) == 2


def test_what_is_refused() -> None:
    caches = layer_outermost(2)
    with pytest.raises(ConfigError, match="at least one layer"):
        PageLayout([])
    with pytest.raises(ConfigError, match=r"must name each of 2 layers once; got \(\(0, 0\),\)"):
        PageLayout(caches, groups=[[0, 0]])
    with pytest.raises(ConfigError, match="layer 1: KV cache has"):
        PageLayout([caches[0], caches[1][:3]])
    with pytest.raises(ConfigError, match="layer 0: a page must fill one run of memory"):
        PageLayout([caches[0][..., :HEAD_DIM]])
    with pytest.raises(ConfigError, match="layer 0: a page must fill one run of memory"):
        PageLayout([caches[0][:1].expand(NUM_SLOTS, -1, -1, -1)])
