"""Streamed prefill attention against one dense softmax in float64."""

from __future__ import annotations

import pytest
import torch
from flashmemory_kernels.partial_attention import partial_attention

from flashmemory_vllm.transfer.engine import CpuTransferEngine
from flashmemory_vllm.transfer.host_pool import HostPool
from flashmemory_vllm.transfer.layout import PageLayout
from flashmemory_vllm.transfer.page_format import CpuVectorPages, InterleavedPages, PageFormat
from flashmemory_vllm.transfer.streaming import PagedHistory, stream_attention
from tests.unit.transfer.pools import (
    BLOCK_SIZE,
    HEAD_DIM,
    NUM_HEADS,
    PAGE_ELEMS,
    block_outermost,
    layer_outermost,
)

QUERY_HEADS, LAYER, SCALE = 6, 1, 0.4
# The largest relative error over all elements that float32 parts and merges may show against float64.
MAX_RELATIVE_ERROR = 1e-5


def dense(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The chunk's T queries over all keys (history, then the chunk itself) in float64."""
    repeat = QUERY_HEADS // NUM_HEADS
    wide_keys, wide_values = (x.double().repeat_interleave(repeat, dim=1) for x in (keys, values))
    logits = torch.einsum("thd,shd->hts", query.double(), wide_keys) * SCALE
    hidden = torch.ones(logits.shape[1:], dtype=torch.bool).triu(len(keys) - len(query) + 1)
    return torch.einsum("hts,shd->thd", logits.masked_fill(hidden, -torch.inf).softmax(-1), wide_values)


def write_page(page_format: PageFormat, page: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Write up to block_size tokens [t, Hkv, D] into a page [1, Hkv, block_size, 2 * D] through its views."""
    page_format.keys(page)[0, :, : len(keys)] = keys.transpose(0, 1)
    page_format.values(page)[0, :, : len(keys)] = values.transpose(0, 1)


def make_history(
    page_format: PageFormat, keys: torch.Tensor, values: torch.Tensor, generator: torch.Generator
) -> PagedHistory:
    """Full blocks in the host pool under shuffled ids, a partial tail in slot 3, NaN everywhere else."""
    caches = (block_outermost if isinstance(page_format, InterleavedPages) else layer_outermost)(LAYER + 1)
    for cache in caches:
        cache.fill_(torch.nan)
    layout = PageLayout(caches)
    num_full, num_tail = divmod(len(keys), BLOCK_SIZE)
    pool = HostPool(num_full + 5, layout)
    pool.poison()
    ids = torch.randperm(num_full + 5, generator=generator)[:num_full]
    for position, block in enumerate(ids.tolist()):
        tokens = slice(position * BLOCK_SIZE, (position + 1) * BLOCK_SIZE)
        page = layout.unflatten(LAYER, pool.layer_view(LAYER)[block : block + 1])
        write_page(page_format, page, keys[tokens], values[tokens])
    if num_tail:
        write_page(page_format, caches[LAYER][3:4], keys[-num_tail:], values[-num_tail:])
    tail_slot = torch.tensor([3]) if num_tail else None
    return PagedHistory(CpuTransferEngine(layout, pool), page_format, LAYER, ids, len(keys), tail_slot)


@pytest.mark.parametrize("format_type", [InterleavedPages, CpuVectorPages])
@pytest.mark.parametrize("num_tokens", [1, 5, 33])
@pytest.mark.parametrize("staging_blocks", [1, 3, 64])
@pytest.mark.parametrize("num_history", [0, 1, 4, 24, 27, 101])
def test_streamed_is_dense(
    num_history: int, staging_blocks: int, num_tokens: int, format_type: type[PageFormat]
) -> None:
    generator = torch.Generator().manual_seed(num_history)
    query = torch.randn(num_tokens, QUERY_HEADS, HEAD_DIM, generator=generator) * 2
    keys, values = torch.randn(2, num_history + num_tokens, NUM_HEADS, HEAD_DIM, generator=generator)
    page_format = format_type(NUM_HEADS, BLOCK_SIZE, HEAD_DIM)
    history = make_history(page_format, keys[:num_history], values[:num_history], generator)
    staging = torch.full((2, staging_blocks, PAGE_ELEMS), torch.nan)

    out = stream_attention(
        query, keys[num_history:], values[num_history:], history, SCALE, (staging[0], staging[1])
    )

    expected = dense(query, keys, values)
    assert out.dtype == query.dtype
    error = (out - expected).abs().max() / expected.abs().max()
    assert error < MAX_RELATIVE_ERROR


def test_low_precision_is_rounded_once_at_the_end() -> None:
    """Many merges must not add up: the error stays within that of a few bf16 roundings."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, QUERY_HEADS, HEAD_DIM, generator=generator)
    keys, values = torch.randn(2, 203, NUM_HEADS, HEAD_DIM, generator=generator).bfloat16().float()
    page_format = InterleavedPages(NUM_HEADS, BLOCK_SIZE, HEAD_DIM)
    history = make_history(page_format, keys[:200], values[:200], generator)
    staging = torch.full((2, 1, PAGE_ELEMS), torch.nan)

    def attend_bf16(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = partial_attention(query.float(), key.float(), value.float(), scale, causal)
        return out.bfloat16(), lse

    query = query.bfloat16()
    out = stream_attention(
        query,
        keys[200:].bfloat16(),
        values[200:].bfloat16(),
        history,
        SCALE,
        (staging[0], staging[1]),
        attend_bf16,
    )
    expected = dense(query.float(), keys, values)
    # Each of 51 parts is rounded once (2^-9 of its size) and averaged; the end result is rounded once more.
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).abs().max() < 2**-8 * values.abs().max()
