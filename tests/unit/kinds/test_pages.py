"""Page formats against the kernels that write the pages: vLLM's own CPU kernels where they are installed."""

from __future__ import annotations

import pytest
import torch

from flashmemory_vllm.kinds.pages import CpuAmxPages, CpuVectorPages, InterleavedPages, LatentPages, PageFormat

HEADS = 2


@pytest.mark.parametrize(
    ("kernel", "format_type", "block_size", "dtype"),
    [
        ("vec", CpuVectorPages, 32, torch.float32),
        ("vec", CpuVectorPages, 32, torch.bfloat16),
        ("vec16", CpuVectorPages, 16, torch.float32),
        ("vec16", CpuVectorPages, 16, torch.bfloat16),
        ("amx", CpuAmxPages, 32, torch.bfloat16),
        ("amx", CpuAmxPages, 64, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("head_dim", [32, 64])
def test_reads_what_the_cpu_kernel_wrote(
    kernel: str, format_type: type[PageFormat], block_size: int, dtype: torch.dtype, head_dim: int
) -> None:
    ops = pytest.importorskip("vllm._custom_ops")
    if not hasattr(torch.ops._C, "cpu_attn_reshape_and_cache"):
        pytest.skip("this vLLM has no CPU kernels")
    if kernel == "amx" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("this CPU has no AMX")
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 3 * block_size, HEADS, head_dim, generator=generator).to(dtype)
    cache = torch.full((5, HEADS, block_size, 2 * head_dim), torch.nan, dtype=dtype)
    slots = torch.cat([torch.arange(block_size) + slot * block_size for slot in (4, 1, 2)])
    halves = cache.view(5, HEADS, 2 * block_size, head_dim)
    ops.cpu_attn_reshape_and_cache(key, value, *halves.chunk(2, dim=2), slots, kernel)
    page_format = format_type(HEADS, block_size, head_dim)
    pages = cache[[4, 1, 2]]
    expected_shape = (3, block_size, HEADS, head_dim)
    assert torch.equal(page_format.keys(pages).transpose(1, 2), key.view(expected_shape))
    assert torch.equal(page_format.values(pages).transpose(1, 2), value.view(expected_shape))


def test_interleaved_pages_are_views() -> None:
    key, value = torch.randn(2, 3, HEADS, 4, 6)
    pages = torch.cat((key, value), dim=-1)
    page_format = InterleavedPages(HEADS, 4, 6)
    assert torch.equal(page_format.keys(pages), key)
    assert torch.equal(page_format.values(pages), value)
    assert page_format.values(pages).untyped_storage().data_ptr() == pages.untyped_storage().data_ptr()


def test_a_latent_is_the_value_within_its_key() -> None:
    pages = torch.randn(3, 4, 6)
    page_format = LatentPages(1, 4, 6, 5)
    assert torch.equal(page_format.keys(pages)[:, 0], pages)
    assert torch.equal(page_format.values(pages)[:, 0], pages[..., :5])
    assert page_format.value_dim == 5


@pytest.mark.parametrize("format_type", [InterleavedPages, CpuVectorPages, CpuAmxPages])
def test_selected_pages_are_the_ones_of_the_table(format_type: type[PageFormat]) -> None:
    page_format = format_type(HEADS, 32, 32)
    pages = torch.randn(5, HEADS, 32, 64)
    table = torch.tensor([4, 1, 2], dtype=torch.int32)
    chosen, order = page_format.select(pages, table)
    for read in (page_format.keys, page_format.values):
        tokens = read(chosen) if order is None else read(chosen)[order]
        assert torch.equal(tokens, read(pages[table]))
    # Who copies, copies what is asked for and no more.
    is_view = page_format.keys(pages).untyped_storage().data_ptr() == pages.untyped_storage().data_ptr()
    assert len(chosen) == (5 if is_view else 3)
