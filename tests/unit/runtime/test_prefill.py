"""Which parts of a batch streamed prefill completes, and what poisoned staging shows."""

import numpy as np
import pytest
import torch
from flashmemory_kernels.partial_attention import partial_attention

from flashmemory_vllm.residency.types import NOTHING, Phase, Row
from flashmemory_vllm.runtime.prefill import StreamedPrefill
from flashmemory_vllm.transfer.engine import CpuTransferEngine
from flashmemory_vllm.transfer.host_pool import HostPool
from flashmemory_vllm.transfer.layout import PageLayout
from flashmemory_vllm.transfer.page_format import InterleavedPages
from tests.unit.transfer.pools import BLOCK_SIZE, HEAD_DIM, NUM_HEADS, PAGE_ELEMS, layer_outermost

QUERY_HEADS, CHUNK, SCALE = 4, 3, 0.4
# History of three blocks on the host; staging takes two at once
STREAMED = np.array([5, 2, 7], np.int32)
STAGING_BLOCKS = 2


class ForgetfulEngine(CpuTransferEngine):
    """Leaves out the last block of each gather."""

    def _gather_layer(self, layer: int, blocks: torch.Tensor, out: torch.Tensor) -> None:
        super()._gather_layer(layer, blocks[:-1], out)


def _complete(engine_cls: type[CpuTransferEngine], *, poison: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [T, Hq * D] of a decode row and a streamed row, and what it was before."""
    generator = torch.Generator().manual_seed(0)
    layout = PageLayout(layer_outermost(1))
    pool = HostPool(8, layout)
    pool.pages.copy_(torch.randn(pool.pages.shape, generator=generator))
    staging = torch.zeros(2, STAGING_BLOCKS, PAGE_ELEMS)
    page_format = InterleavedPages(NUM_HEADS, BLOCK_SIZE, HEAD_DIM)
    prefill = StreamedPrefill(
        engine_cls(layout, pool), page_format, (staging[0], staging[1]), SCALE, partial_attention, poison=poison
    )
    num_history_tokens = len(STREAMED) * BLOCK_SIZE
    written = np.array([1], np.int32)
    decode = Row("decode", Phase.DECODE, 4, 1, (written,), (written,), (0,), (NOTHING,))
    streamed = Row(
        "streamed", Phase.PREFILL, num_history_tokens, CHUNK, (written,), (written,), (num_history_tokens,), (STREAMED,)
    )
    prefill.set_rows([decode, streamed])
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
