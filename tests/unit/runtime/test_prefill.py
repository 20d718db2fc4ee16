"""Streamed prefill of a whole batch against dense attention: rows, layers, groups, and what poison shows."""

import numpy as np
import pytest
import torch
from flashmemory_kernels.partial_attention import partial_attention

from flashmemory_vllm.kinds.base import PageKind
from flashmemory_vllm.kinds.pages import InterleavedPages
from flashmemory_vllm.residency.batch import Batch
from flashmemory_vllm.residency.types import NOTHING, Phase, Row
from flashmemory_vllm.runtime.prefill import StreamedPrefill
from flashmemory_vllm.transfer.engine import CpuTransferEngine, Ids, Marker
from flashmemory_vllm.transfer.host_pool import HostPool
from flashmemory_vllm.transfer.layout import PageLayout
from tests.unit.kinds.test_streaming import MAX_RELATIVE_ERROR
from tests.unit.transfer.pools import BLOCK_SIZE, HEAD_DIM, NUM_HEADS, NUM_SLOTS, PAGE_BYTES, layer_outermost

QUERY_HEADS, CHUNK, SCALE = 4, 3, 0.4
# History of three blocks on the host; staging takes two at once
STREAMED = np.array([5, 2, 7], np.int32)
STAGING_BLOCKS = 2
KIND = PageKind(InterleavedPages(NUM_HEADS, BLOCK_SIZE, HEAD_DIM), SCALE, partial_attention)


class ForgetfulEngine(CpuTransferEngine):
    """Leaves out the last block of each gather."""

    def _gather_layer(
        self, layer: int, blocks: torch.Tensor, host_blocks: Ids, out: torch.Tensor, after: Marker | None
    ) -> None:
        super()._gather_layer(layer, blocks[:-1], host_blocks[:-1], out, after)


def _complete(engine_cls: type[CpuTransferEngine], *, poison: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [T, Hq * D] of a decode row and a streamed row, and what it was before."""
    generator = torch.Generator().manual_seed(0)
    layout = PageLayout(layer_outermost(1))
    pool = HostPool(8, layout)
    numbers = pool.pages.view(torch.float32)
    numbers.copy_(torch.randn(numbers.shape, generator=generator))
    staging = torch.zeros(3, STAGING_BLOCKS, PAGE_BYTES, dtype=torch.uint8)
    prefill = StreamedPrefill(engine_cls(layout, pool), KIND, staging, poison=poison)
    num_history_tokens = len(STREAMED) * BLOCK_SIZE
    written = np.array([1], np.int32)
    decode = Row("decode", Phase.DECODE, 4, 1, (written,), (written,), (0,), (NOTHING,))
    streamed = Row(
        "streamed", Phase.PREFILL, num_history_tokens, CHUNK, (written,), (written,), (num_history_tokens,), (STREAMED,)
    )
    prefill.set_rows(Batch.of([decode, streamed], [0, 1]))
    query, key, value, before = (
        torch.randn(1 + CHUNK, heads, HEAD_DIM, generator=generator)
        for heads in (QUERY_HEADS, NUM_HEADS, NUM_HEADS, QUERY_HEADS)
    )
    output = before.reshape(1 + CHUNK, -1).clone()
    prefill.complete(0, 0, query, key, value, output)
    return output, before.reshape(1 + CHUNK, -1)


def test_only_the_streamed_row_is_completed() -> None:
    output, before = _complete(CpuTransferEngine, poison=False)
    assert torch.equal(output[0], before[0])
    assert (output[1:] != before[1:]).all()


def test_poison_changes_nothing_that_is_fetched() -> None:
    assert torch.equal(_complete(CpuTransferEngine, poison=True)[0], _complete(CpuTransferEngine, poison=False)[0])


@pytest.mark.parametrize("poison", [False, True])
def test_poison_shows_what_was_not_fetched(poison: bool) -> None:
    output, _ = _complete(ForgetfulEngine, poison=poison)
    assert output[1:].isnan().all() == poison
    assert not output[0].isnan().any()


# Blocks of each row's history, and for each layer group how many of them are streamed; a tail of two tokens.
HISTORIES = [(3, (3, 1)), (0, (0, 0)), (5, (5, 5)), (2, (0, 2))]
TAIL = 2
LAYERS = ((0, 2), (1,))


def _batch(content: torch.Tensor, pool: HostPool, caches: list[torch.Tensor]) -> list[Row]:
    """Rows whose history [blocks, tokens of a page, ...] lies on the host where it is streamed, else in slots."""
    rows: list[Row] = []
    next_block = iter(np.random.default_rng(0).permutation(pool.num_blocks))
    next_slot = [iter(range(NUM_SLOTS)) for _ in LAYERS]
    for index, (num_blocks, num_streamed) in enumerate(HISTORIES):
        blocks = np.array([next(next_block) for _ in range(num_blocks)], np.int32)
        tail = min(num_blocks, 1)
        slots = tuple(
            np.array([next(next_slot[group]) for _ in range(num_blocks - count + tail)], np.int32)
            for group, count in enumerate(num_streamed)
        )
        for layer, group in ((layer, group) for group, layers in enumerate(LAYERS) for layer in layers):
            count = num_streamed[group]
            pages = content[index, layer, : num_blocks + tail]
            pool.layer_view(layer).view(torch.float32)[blocks[:count]] = pages[:count].flatten(1)
            caches[layer][slots[group]] = pages[count:]
        evicted = tuple(count * BLOCK_SIZE for count in num_streamed)
        streamed = tuple(blocks[:count] for count in num_streamed)
        rows.append(
            Row(
                str(index), Phase.PREFILL, num_blocks * BLOCK_SIZE + tail * TAIL, CHUNK, slots, slots, evicted, streamed
            )
        )
    return rows


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("num_buffers", [1, 2, 3])
@pytest.mark.parametrize("runs", [[0], [2, 0], [3, 1, 0]], ids=["one run", "two runs", "three runs"])
def test_rows_layers_and_groups_are_dense_attention(runs: list[int], num_buffers: int, poison: bool) -> None:
    """However many runs a batch is computed in; each begins with one of these rows."""
    generator = torch.Generator().manual_seed(1)
    caches = layer_outermost(3)
    layout = PageLayout(caches, LAYERS)
    pool = HostPool(12, layout)
    pool.poison()
    content = torch.randn(len(HISTORIES), 3, 6, NUM_HEADS, BLOCK_SIZE, 2 * HEAD_DIM, generator=generator)
    rows = _batch(content, pool, caches)
    prefill = StreamedPrefill(
        CpuTransferEngine(layout, pool),
        KIND,
        torch.zeros(num_buffers, STAGING_BLOCKS, PAGE_BYTES, dtype=torch.uint8),
        poison=poison,
    )
    for _ in range(2):  # the second step begins where the first left the ring
        prefill.set_rows(Batch.of(rows, range(len(rows))))
        for layer in range(3):
            group = int(layer in LAYERS[1])
            query, key, value = (
                torch.randn(CHUNK * len(rows), heads, HEAD_DIM, generator=generator)
                for heads in (QUERY_HEADS, NUM_HEADS, NUM_HEADS)
            )
            output = torch.full_like(query, torch.nan)
            completed = []
            for first, behind in zip(runs, [len(rows), *runs], strict=False):
                run = slice(first * CHUNK, behind * CHUNK)
                given = query[run], key[run], value[run], output[run]
                completed += [run.start + own.start for own in prefill.complete(layer, group, *given, run.start)]
            assert sorted(completed) == [index * CHUNK for index, row in enumerate(rows) if len(row.streamed[group])]
            for index, row in enumerate(rows):
                own = slice(index * CHUNK, (index + 1) * CHUNK)
                if not len(row.streamed[group]):
                    assert output[own].isnan().all()
                    continue
                past = content[index, layer].transpose(1, 2).flatten(0, 1)[: row.num_computed_tokens]
                keys, values = (
                    torch.cat((past[..., part], new[own])).double().repeat_interleave(QUERY_HEADS // NUM_HEADS, 1)
                    for part, new in ((slice(HEAD_DIM), key), (slice(HEAD_DIM, None), value))
                )
                logits = torch.einsum("thd,shd->hts", query[own].double(), keys) * SCALE
                future = torch.ones(logits.shape[1:], dtype=torch.bool).triu(row.num_computed_tokens + 1)
                expected = torch.einsum("hts,shd->thd", logits.masked_fill(future, -torch.inf).softmax(-1), values)
                assert (output[own] - expected).abs().max() / expected.abs().max() < MAX_RELATIVE_ERROR
