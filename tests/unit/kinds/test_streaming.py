"""Streamed prefill attention against one dense softmax in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flashmemory_kernels.partial_attention import partial_attention

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.kinds.base import Chunk, PageKind, PartialAttention
from flashmemory_vllm.kinds.pages import CpuVectorPages, InterleavedPages, LatentPages, PageFormat
from flashmemory_vllm.kinds.streaming import StreamedAttention, StreamedHistory
from flashmemory_vllm.transfer.engine import CpuTransferEngine
from flashmemory_vllm.transfer.host_pool import HostPool
from flashmemory_vllm.transfer.layout import POISON, PageLayout
from flashmemory_vllm.transfer.staging import StagingRing, split_history
from tests.unit.transfer.pools import (
    BLOCK_SIZE,
    HEAD_DIM,
    NUM_HEADS,
    NUM_SLOTS,
    PAGE_BYTES,
    block_outermost,
    layer_outermost,
)

QUERY_HEADS, LAYER, SCALE = 6, 1, 0.4
LATENT_DIM = 4
# The largest relative error over all elements that float32 parts and merges may show against float64.
MAX_RELATIVE_ERROR = 1e-5


def dense(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sink: torch.Tensor | None = None
) -> torch.Tensor:
    """The chunk's T queries over all keys (history, then the chunk itself) and a sink [H], if any, in float64."""
    repeat = QUERY_HEADS // keys.shape[1]
    wide_keys, wide_values = (x.double().repeat_interleave(repeat, dim=1) for x in (keys, values))
    logits = torch.einsum("thd,shd->hts", query.double(), wide_keys) * SCALE
    hidden = torch.ones(logits.shape[1:], dtype=torch.bool).triu(len(keys) - len(query) + 1)
    logits = logits.masked_fill(hidden, -torch.inf)
    if sink is not None:
        logits = torch.cat([logits, sink.double()[:, None, None].expand(-1, len(query), 1)], dim=-1)
    return torch.einsum("hts,shd->thd", logits.softmax(-1)[..., : len(keys)], wide_values)


def write_page(page_format: PageFormat, page: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Write up to block_size tokens [t, Hkv, D] into a page [1, ...page] through its views."""
    page_format.keys(page)[0, :, : len(keys)] = keys.transpose(0, 1)
    page_format.values(page)[0, :, : len(keys)] = values.transpose(0, 1)


def make_caches(page_format: PageFormat) -> list[torch.Tensor]:
    """Of two layers, as vLLM lays out the caches of such pages."""
    if isinstance(page_format, LatentPages):
        return list(torch.zeros(LAYER + 1, NUM_SLOTS, BLOCK_SIZE, page_format.head_dim))
    return (block_outermost if isinstance(page_format, InterleavedPages) else layer_outermost)(LAYER + 1)


def make_history(
    page_format: PageFormat,
    keys: torch.Tensor,
    values: torch.Tensor,
    staging_blocks: int,
    num_on_device: int = 0,
) -> tuple[CpuTransferEngine, StreamedHistory]:
    """Full blocks in the host pool, the last few and the tail in slots, all shuffled; NaN everywhere else."""
    generator = torch.Generator().manual_seed(len(keys))
    caches = make_caches(page_format)
    for cache in caches:
        cache.fill_(torch.nan)
    layout = PageLayout(caches)
    num_host = max(0, len(keys) // BLOCK_SIZE - num_on_device)
    num_blocks = -(-len(keys) // BLOCK_SIZE)
    engine = CpuTransferEngine(layout, HostPool(num_host + 5, layout))
    engine.pool.poison()
    ids = torch.randperm(num_host + 5, generator=generator)[:num_host]
    slots = torch.randperm(NUM_SLOTS, generator=generator)[: num_blocks - num_host]
    in_host = layout.unflatten(LAYER, engine.pool.layer_view(LAYER))
    pages = [in_host[i : i + 1] for i in ids.tolist()] + [caches[LAYER][i : i + 1] for i in slots.tolist()]
    for page, start in zip(pages, range(0, len(keys), BLOCK_SIZE), strict=True):
        write_page(page_format, page, keys[start : start + BLOCK_SIZE], values[start : start + BLOCK_SIZE])
    parts = split_history(ids, ids.numpy().astype(np.int32), staging_blocks) if num_host else ()
    return engine, StreamedHistory(len(keys), parts, slots.int(), BLOCK_SIZE)


def stream(
    page_format: PageFormat,
    chunk: Chunk,
    engine: CpuTransferEngine,
    history: StreamedHistory,
    staging_blocks: int,
    attend: PartialAttention = partial_attention,
    sinks: dict[int, torch.Tensor] | None = None,
) -> None:
    ring = StagingRing(engine, torch.full((2, staging_blocks, PAGE_BYTES), POISON, dtype=torch.uint8))
    ring.begin((LAYER, part) for part in history.parts)
    kind = PageKind(page_format, SCALE, attend, sinks or {})
    StreamedAttention(engine.layout, kind, ring).complete(LAYER, chunk, history)


@pytest.mark.parametrize("format_type", [InterleavedPages, CpuVectorPages])
@pytest.mark.parametrize("num_tokens", [1, 5, 33])
@pytest.mark.parametrize("staging_blocks", [1, 3, 64])
@pytest.mark.parametrize("num_on_device", [0, 4])
@pytest.mark.parametrize("num_history", [0, 1, 4, 24, 27, 101])
def test_streamed_is_dense(
    num_history: int, num_on_device: int, staging_blocks: int, num_tokens: int, format_type: type[PageFormat]
) -> None:
    generator = torch.Generator().manual_seed(num_history)
    query = torch.randn(num_tokens, QUERY_HEADS, HEAD_DIM, generator=generator) * 2
    keys, values = torch.randn(2, num_history + num_tokens, NUM_HEADS, HEAD_DIM, generator=generator)
    page_format = format_type(NUM_HEADS, BLOCK_SIZE, HEAD_DIM)
    engine, history = make_history(page_format, keys[:num_history], values[:num_history], staging_blocks, num_on_device)
    chunk = Chunk(query, keys[num_history:], values[num_history:], torch.full_like(query, torch.nan))

    stream(page_format, chunk, engine, history, staging_blocks)

    expected = dense(query, keys, values)
    error = (chunk.output - expected).abs().max() / expected.abs().max()
    assert error < MAX_RELATIVE_ERROR


@pytest.mark.parametrize("num_on_device", [0, 4])
@pytest.mark.parametrize("num_history", [0, 4, 27, 101])
def test_streamed_latents_are_dense(num_history: int, num_on_device: int) -> None:
    """One key for all heads, whose first elements are the value."""
    generator = torch.Generator().manual_seed(num_history)
    query = torch.randn(5, QUERY_HEADS, HEAD_DIM, generator=generator) * 2
    keys = torch.randn(num_history + 5, 1, HEAD_DIM, generator=generator)
    page_format = LatentPages(1, BLOCK_SIZE, HEAD_DIM, LATENT_DIM)
    values = keys[..., :LATENT_DIM]
    engine, history = make_history(page_format, keys[:num_history], values[:num_history], 3, num_on_device)
    output = torch.full((5, QUERY_HEADS, LATENT_DIM), torch.nan)

    stream(page_format, Chunk(query, keys[num_history:], values[num_history:], output), engine, history, 3)

    expected = dense(query, keys, values)
    assert (output - expected).abs().max() / expected.abs().max() < MAX_RELATIVE_ERROR


@pytest.mark.parametrize("num_history", [0, 9, 41])
def test_a_sink_counts_once_however_many_parts_there_are(num_history: int) -> None:
    generator = torch.Generator().manual_seed(num_history)
    query = torch.randn(5, QUERY_HEADS, HEAD_DIM, generator=generator)
    keys, values = torch.randn(2, num_history + 5, NUM_HEADS, HEAD_DIM, generator=generator)
    sink = torch.linspace(-3, 5, QUERY_HEADS)
    page_format = InterleavedPages(NUM_HEADS, BLOCK_SIZE, HEAD_DIM)
    engine, history = make_history(page_format, keys[:num_history], values[:num_history], staging_blocks=1)
    chunk = Chunk(query, keys[num_history:], values[num_history:], torch.full_like(query, torch.nan))

    # That of another layer is another's
    stream(page_format, chunk, engine, history, 1, sinks={LAYER: sink, LAYER + 1: sink + 1})

    expected = dense(query, keys, values, sink)
    assert (chunk.output - expected).abs().max() / expected.abs().max() < MAX_RELATIVE_ERROR


def test_low_precision_is_rounded_once_at_the_end() -> None:
    """Many merges must not add up: the error stays within that of a few bf16 roundings."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, QUERY_HEADS, HEAD_DIM, generator=generator)
    keys, values = torch.randn(2, 203, NUM_HEADS, HEAD_DIM, generator=generator).bfloat16().float()
    page_format = InterleavedPages(NUM_HEADS, BLOCK_SIZE, HEAD_DIM)
    engine, history = make_history(page_format, keys[:200], values[:200], staging_blocks=1)

    def attend_bf16(
        query: torch.Tensor,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        block_table: torch.Tensor | None,
        num_tokens: int,
        scale: float,
        causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = query.float(), key_pages.float(), value_pages.float()
        out, lse = partial_attention(*wide, block_table, num_tokens, scale, causal)
        return out.bfloat16(), lse

    query = query.bfloat16()
    chunk = Chunk(query, keys[200:].bfloat16(), values[200:].bfloat16(), torch.empty_like(query))
    stream(page_format, chunk, engine, history, 1, attend_bf16)
    expected = dense(query.float(), keys, values)
    # Each of 51 parts is rounded once (2^-9 of its size) and averaged; the end result is rounded once more.
    assert (chunk.output.double() - expected).abs().max() < 2**-8 * values.abs().max()


@pytest.mark.parametrize(
    ("num_tokens", "num_slots"),
    [(9, 0), (8, 1), (12, 0), (7, 0), (12, 2)],
    ids=["no tail", "a block too many", "a block too few", "tail from the host", "a slot too many"],
)
def test_history_that_its_pages_do_not_hold_is_refused(num_tokens: int, num_slots: int) -> None:
    parts = split_history(torch.arange(2), np.arange(2, dtype=np.int32), 1)
    slots = torch.arange(num_slots, dtype=torch.int32)
    with pytest.raises(IntegrityError, match=f"a history of {num_tokens} tokens has .* got 2 host and {num_slots} "):
        StreamedHistory(num_tokens, parts, slots, BLOCK_SIZE)
