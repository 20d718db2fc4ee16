"""Streamed prefill on a GPU: its parts (FlashAttention, merges in place) and the whole against dense attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flashmemory_kernels.merge_attention import merge_attention
from flashmemory_kernels.merge_attention.cases import CASES, MergeCase
from flashmemory_kernels.merge_attention.naive import merge_attention_naive
from flashmemory_kernels.partial_attention import partial_attention

from flashmemory_vllm.kinds.base import Chunk, PageKind
from flashmemory_vllm.kinds.pages import InterleavedPages
from flashmemory_vllm.kinds.streaming import StreamedAttention, StreamedHistory
from flashmemory_vllm.transfer.cuda_engine import CudaTransferEngine
from flashmemory_vllm.transfer.host_pool import HostPool
from flashmemory_vllm.transfer.layout import PageLayout
from flashmemory_vllm.transfer.staging import NUM_STAGING_BUFFERS, StagingRing, split_history

LAYERS, SLOTS, BLOCKS, BLOCK_SIZE = 3, 16, 64, 16
# exp, log and one division in float32 by two compilers.
TOL_FP32: dict[str, Any] = {"rtol": 3e-6, "atol": 3e-6}
# bf16 keeps 8 bits of the output, and FlashAttention rounds its weights to bf16 too.
TOL_BF16: dict[str, Any] = {"rtol": 2e-2, "atol": 1e-2}
TOL_LSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3}


@pytest.mark.parametrize("case", [*CASES, MergeCase(num_tokens=1000, num_heads=8, head_dim=128)])
def test_merges_in_place_and_into_the_output(case: MergeCase) -> None:
    first, second = torch.randn(2, *case, device="cuda").bfloat16()
    lses = torch.randn(2, case.num_heads, case.num_tokens, device="cuda") * 5
    first[0], lses[0, :, 0] = torch.nan, -torch.inf
    expected, expected_lse = merge_attention_naive(first.float(), lses[0], second, lses[1])
    total, lse = first.float(), lses[0].clone()
    merge_attention(total, lse, second, lses[1], total, lse)
    torch.testing.assert_close(total, expected, **TOL_FP32)
    torch.testing.assert_close(lse, expected_lse, **TOL_FP32)
    output = torch.full((case.num_tokens, case.num_heads * case.head_dim), torch.nan, device="cuda").bfloat16()
    merge_attention(first, lses[0], second, lses[1], output.view(case), lse)
    torch.testing.assert_close(output.view(case).float(), expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(8, 2), (4, 1)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_keys", [1, 16, 200, 1000])
def test_flash_attention_reads_pages_where_they_lie(
    num_keys: int, head_dim: int, num_heads: int, num_kv_heads: int
) -> None:
    """In order, by table, and as the chunk's own keys; NaN in pages that are not meant."""
    pytest.importorskip("vllm.vllm_flash_attn")
    from flashmemory_vllm.plugin.backends.flash_partial import flash_partial_attention

    num_pages = -(-num_keys // BLOCK_SIZE)
    # Queries are a slice of a wider row, as those of a fused projection are.
    query = torch.randn(100, num_heads + 2, head_dim, device="cuda").bfloat16()[:, :num_heads]
    shape = (num_pages + 3, LAYERS, BLOCK_SIZE, num_kv_heads, 2 * head_dim)
    caches = torch.full(shape, torch.nan, dtype=torch.bfloat16, device="cuda")
    table = torch.randperm(num_pages + 3, device="cuda")[:num_pages]
    caches[table, 1] = torch.randn(num_pages, *shape[2:], device="cuda").bfloat16()
    in_order = caches[table, 1].contiguous()
    for pages, order in ((caches[:, 1], table.int()), (in_order, None)):
        where = (pages[..., :head_dim], pages[..., head_dim:], order, num_keys, 0.1, False)
        out, lse = flash_partial_attention(query, *where)
        expected, expected_lse = partial_attention(query, *where)
        torch.testing.assert_close(out, expected, **TOL_BF16)
        torch.testing.assert_close(lse, expected_lse, **TOL_LSE)
    own = in_order.flatten(0, 1)[:num_keys].unsqueeze(0)
    queries = torch.randn(num_keys, num_heads, head_dim, device="cuda").bfloat16()
    where = (own[..., :head_dim], own[..., head_dim:], None, num_keys, 0.1, True)
    out, lse = flash_partial_attention(queries, *where)
    expected, expected_lse = partial_attention(queries, *where)
    torch.testing.assert_close(out, expected, **TOL_BF16)
    torch.testing.assert_close(lse, expected_lse, **TOL_LSE)


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("num_history", [5, 16, 400, 1000])
def test_streamed_attention_is_dense(num_history: int, poison: bool) -> None:
    heads, head_dim = 2, 64
    caches = torch.zeros(SLOTS, LAYERS, BLOCK_SIZE, heads, 2 * head_dim, device="cuda").permute(1, 0, 3, 2, 4)
    layout = PageLayout(list(caches))
    pool = HostPool(BLOCKS, layout, pin=True)
    pool.poison()
    engine = CudaTransferEngine(layout, pool)
    generator = torch.Generator().manual_seed(num_history)
    query = torch.randn(40, 4, head_dim, generator=generator)
    keys, values = torch.randn(2, num_history + 40, heads, head_dim, generator=generator)
    num_full, num_tail = divmod(num_history, BLOCK_SIZE)
    ids = torch.randperm(BLOCKS, generator=generator)[:num_full]
    tokens = torch.cat((keys, values), dim=-1)
    for position, block in enumerate(ids.tolist()):
        for layer in range(LAYERS):
            page = layout.unflatten(layer, pool.layer_view(layer)[block : block + 1])
            page[0] = tokens[position * BLOCK_SIZE : (position + 1) * BLOCK_SIZE].transpose(0, 1)
    caches[:, 3, :, :num_tail] = tokens[num_history - num_tail : num_history].transpose(0, 1).cuda()
    host_ids = ids.numpy().astype(np.int32)
    parts = split_history(engine.upload(host_ids), host_ids, 4) if num_full else ()
    slots = torch.full((min(num_tail, 1),), 3, dtype=torch.int32, device="cuda")
    history = StreamedHistory(num_history, parts, slots, BLOCK_SIZE)
    staging = torch.zeros(NUM_STAGING_BUFFERS, 4, layout.layer_bytes(0), dtype=torch.uint8, device="cuda")
    ring = StagingRing(engine, staging, poison)
    page_format = InterleavedPages(heads, BLOCK_SIZE, head_dim)
    attention = StreamedAttention(layout, PageKind(page_format, 0.2, partial_attention), ring)
    ring.begin((layer, part) for layer in range(LAYERS) for part in parts)

    outputs = torch.full((LAYERS, *query.shape), torch.nan, device="cuda")
    for layer in range(LAYERS):
        chunk = Chunk(query.cuda(), keys[num_history:].cuda(), values[num_history:].cuda(), outputs[layer])
        attention.complete(layer, chunk, history)

    wide_keys, wide_values = (x.double().repeat_interleave(2, dim=1) for x in (keys, values))
    logits = torch.einsum("thd,shd->hts", query.double(), wide_keys) * 0.2
    logits += torch.full(logits.shape[1:], -torch.inf, dtype=torch.float64).triu(num_history + 1)
    expected = torch.einsum("hts,shd->thd", logits.softmax(-1), wide_values)
    # float32 parts and merges against float64.
    for output in outputs.cpu():
        assert (output - expected).abs().max() / expected.abs().max() < 1e-5
    pool.close()
