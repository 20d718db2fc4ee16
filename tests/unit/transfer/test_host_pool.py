"""HostPool: one row per block, strided views per layer and per run, and a clear refusal."""

from __future__ import annotations

import logging

import pytest
import torch

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.transfer import host_pool as module
from flashmemory_vllm.transfer.host_pool import HostPool
from flashmemory_vllm.transfer.layout import PageLayout
from tests.unit.transfer.pools import CACHES, PAGE_BYTES, PAGE_ELEMS, MakeCaches, block_outermost


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("caches", CACHES.values(), ids=CACHES)
def test_layers_partition_a_contiguous_row(caches: MakeCaches, dtype: torch.dtype) -> None:
    layout = PageLayout(caches(3, dtype), groups=[[0, 2], [1]])
    pool = HostPool(5, layout)
    assert pool.num_bytes == pool.pages.untyped_storage().nbytes() == 5 * layout.block_bytes
    assert (pool.pages.dtype, pool.pages.stride(0)) == (torch.uint8, layout.block_bytes)
    page_bytes = PAGE_ELEMS * dtype.itemsize
    for layer in range(3):
        assert pool.layer_view(layer).shape == (5, page_bytes)
        pool.layer_view(layer).fill_(layer + 1)
    row = torch.tensor([1, 3, 2], dtype=torch.uint8).repeat_interleave(page_bytes)
    assert torch.equal(pool.pages, row.expand(5, -1))
    for group in (0, 1):
        for run in layout.runs(group):
            assert pool.run_view(run).shape == (5, run.num_bytes)
            assert torch.equal(pool.run_view(run)[:, :page_bytes], pool.layer_view(run.layers[0]))


def test_memory_is_page_aligned_so_that_it_can_be_pinned() -> None:
    assert HostPool(3, PageLayout(block_outermost(2))).pages.data_ptr() % 4096 == 0


def test_poison_is_nan() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        pool = HostPool(2, PageLayout(block_outermost(1, dtype)))
        pool.poison()
        assert bool(pool.pages.view(dtype).float().isnan().all())


def test_impossible_size_is_refused_with_its_figures() -> None:
    layout = PageLayout(block_outermost(1))
    with pytest.raises(ConfigError, match=r"cannot map the host pool: .* blocks of 384 bytes .* GiB\)"):
        HostPool(1 << 50, layout)


class Runtime:
    """A CUDA runtime that can pin so many pieces."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        assert flags == 0
        if len(self.pinned) == self.limit:
            return 2
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802 - CUDA's name
        del self.pinned[address]
        return 0


def install(monkeypatch: pytest.MonkeyPatch, limit: int) -> Runtime:
    runtime = Runtime(limit)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(module, "PIN_CHUNK_BYTES", 4096)
    monkeypatch.setattr(module, "REPORT_BYTES", 8192)
    return runtime


def test_every_byte_is_pinned_once_and_unpinned_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = install(monkeypatch, limit=100)
    with caplog.at_level(logging.INFO, logger="vllm.flashmemory"):
        pool = HostPool(50, PageLayout(block_outermost(1)), pin=True)
    assert pool.num_bytes == 50 * 384
    start = pool.pages.data_ptr()
    # Pieces begin with a page of memory and with a row: 12288 is the least multiple of both.
    assert runtime.pinned == {start: 12288, start + 12288: 50 * 384 - 12288}
    assert [record.message.split(" in ")[0] for record in caplog.records] == ["host pool: 0 of 0 GiB pinned"] * 2
    pool.close()
    assert runtime.pinned == {}


def test_memory_that_cannot_be_pinned_is_given_back_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = install(monkeypatch, limit=1)
    with pytest.raises(ConfigError, match=r"cannot pin 0.00 GiB of host pool: failed after .* \(cudaHostRegister: 2\)"):
        HostPool(50, PageLayout(block_outermost(1)), pin=True)
    assert runtime.pinned == {}


def test_the_same_memory_takes_another_order_of_layers_and_is_unpinned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = install(monkeypatch, limit=100)
    caches = block_outermost(3)
    pool = HostPool(50, PageLayout(caches), pin=True)
    other = pool.laid_out(PageLayout(caches, groups=[[2], [0, 1]]))
    assert other.pages is pool.pages
    other.layer_view(2).fill_(7)
    assert bool((pool.pages[:, :PAGE_BYTES] == 7).all())
    assert not bool(pool.pages[:, PAGE_BYTES:].any())
    other.close()
    pool.close()
    assert runtime.pinned == {}


def test_a_layout_with_other_rows_is_refused() -> None:
    pool = HostPool(5, PageLayout(block_outermost(1)))
    with pytest.raises(ConfigError, match=r"rows of 768 bytes given, allowed are 384, as it was mapped"):
        pool.laid_out(PageLayout(block_outermost(2)))
