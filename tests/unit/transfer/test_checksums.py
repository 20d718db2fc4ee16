"""Pages that come back other than they left are found, in both engines and on both ways, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from random import Random

import numpy as np
import pytest
import torch

from flashmemory_vllm.transfer.checksums import SAMPLED, Comparison, PageChecks, PageSums
from flashmemory_vllm.transfer.cuda_engine import CudaTransferEngine
from flashmemory_vllm.transfer.engine import CpuTransferEngine, Ids, TransferEngine
from flashmemory_vllm.transfer.host_pool import HostPool
from flashmemory_vllm.transfer.layout import PageLayout
from tests.unit.transfer.pools import CACHES, NUM_SLOTS, PAGE_BYTES
from tests.unit.transfer.streams import simulated

NUM_BLOCKS = 40
GROUPS = [[0, 1, 3], [2]]
BLOCKS, SLOTS = np.array([8, 2, 5], np.int32), np.array([1, 6, 3], np.int32)


def make_layout(kind: str) -> PageLayout:
    caches = CACHES[kind](4)
    for cache in caches:
        cache.copy_(torch.randn(cache.shape))
    return PageLayout(caches, GROUPS)


@pytest.fixture(params=["cpu", "simulated, dma", "simulated, kernel"])
def engine_cls(request: pytest.FixtureRequest) -> Iterator[type[TransferEngine]]:
    """Both engines, the CUDA one on streams that run in a random order."""
    is_cpu = request.param == "cpu"
    with nullcontext() if is_cpu else simulated(Random(7), by_dma="dma" in request.param):
        yield CpuTransferEngine if is_cpu else CudaTransferEngine


def make_engine(engine_cls: type[TransferEngine], kind: str, compared: int | None) -> TransferEngine:
    """All blocks of both groups are on the host, those of BLOCKS from SLOTS."""
    layout = make_layout(kind)
    engine = engine_cls(layout, HostPool(NUM_BLOCKS, layout), compared)
    for group in range(len(GROUPS)):
        for start in range(0, NUM_BLOCKS, NUM_SLOTS):
            blocks = np.arange(start, min(start + NUM_SLOTS, NUM_BLOCKS), dtype=np.int32)
            engine.write_back(group, blocks, np.arange(len(blocks), dtype=np.int32))
        engine.write_back(group, BLOCKS, SLOTS)
    engine.synchronize()
    return engine


def flip(engine: TransferEngine, block: int, layer: int) -> None:
    """Flip the lowest bit of the last element of one page."""
    engine.pool.layer_view(layer)[block, -1:] ^= 1


def wrong(comparisons: tuple[Comparison, ...]) -> set[tuple[int, int]]:
    """Place of the layer in its comparison and block of every page that is wrong."""
    found = set()
    for comparison in comparisons:
        for place, at in np.argwhere(comparison.wrong_pages()).tolist():
            found.add((place, int(comparison.blocks[at])))
    return found


@pytest.mark.parametrize("kind", CACHES)
def test_a_recall_finds_the_page_that_was_changed(engine_cls: type[TransferEngine], kind: str) -> None:
    engine = make_engine(engine_cls, kind, 1)
    flip(engine, 5, layer=1)
    engine.recall(0, BLOCKS, np.array([0, 2, 4], np.int32), engine.marker())
    engine.recall(1, BLOCKS, np.array([0, 2, 4], np.int32), engine.marker())
    assert engine.take_comparisons() == (), "nothing may read them before the fence"
    engine.fence([])
    assert wrong(engine.take_comparisons()) == {(1, 5)}
    assert engine.take_comparisons() == ()
    assert engine.counters.compared_pages == 3 * 4
    engine.synchronize()
    for layer in range(4):
        pages, expected = engine.layout.page_view(layer)[[0, 2, 4]], engine.pool.layer_view(layer)[BLOCKS].clone()
        if layer == 1:
            expected[2] = 0  # what is read of it before anybody knows is a number
        torch.testing.assert_close(pages, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", CACHES)
def test_streamed_history_finds_it_too(engine_cls: type[TransferEngine], kind: str) -> None:
    engine = make_engine(engine_cls, kind, 1)
    flip(engine, 2, layer=3)
    staging = torch.zeros(6, PAGE_BYTES, dtype=torch.uint8)
    for layer in range(4):
        engine.wait(engine.gather_layer(layer, engine.upload(BLOCKS), BLOCKS, staging, engine.marker()))
        expected = {(0, 2)} if layer == 3 else set()
        assert wrong(engine.take_comparisons()) == expected
        engine.synchronize()
        assert (staging[:3] == 0).all(dim=1).tolist() == [False, layer == 3, False]


def test_a_stale_page_and_one_of_another_block_are_wrong(engine_cls: type[TransferEngine]) -> None:
    engine = make_engine(engine_cls, "layer_outermost", 1)
    older = engine.pool.pages[8].clone()
    engine.layout.page_view(0)[1] += 1
    engine.write_back(0, BLOCKS[:1], SLOTS[:1])
    engine.synchronize()
    torch.testing.assert_close(engine.pool.layer_view(0)[8], engine.layout.page_view(0)[1])
    engine.pool.pages[8] = older
    engine.pool.pages[2] = engine.pool.pages[5]
    engine.recall(0, BLOCKS, np.array([0, 2, 4], np.int32), engine.marker())
    engine.fence([])
    assert wrong(engine.take_comparisons()) == {(0, 8), (0, 2), (1, 2), (2, 2)}


def test_what_is_written_again_has_a_new_sum(engine_cls: type[TransferEngine]) -> None:
    engine = make_engine(engine_cls, "block_outermost", 1)
    flip(engine, 5, layer=0)
    engine.write_back(0, BLOCKS, SLOTS)
    engine.recall(0, BLOCKS, np.array([0, 2, 4], np.int32), engine.marker())
    engine.fence([])
    assert wrong(engine.take_comparisons()) == set()


def test_without_checksums_nobody_looks(engine_cls: type[TransferEngine]) -> None:
    engine = make_engine(engine_cls, "block_outermost", None)
    flip(engine, 5, layer=0)
    engine.recall(0, BLOCKS, np.array([0, 2, 4], np.int32), engine.marker())
    engine.fence([])
    assert engine.take_comparisons() == ()
    assert engine.counters.compared_pages == 0


def test_pages_of_low_precision_have_sums() -> None:
    layout = PageLayout(CACHES["block_outermost"](2, torch.bfloat16))
    engine = CpuTransferEngine(layout, HostPool(NUM_BLOCKS, layout), 1)
    engine.write_back(0, BLOCKS, SLOTS)
    engine.pool.pages[2, 1] = 0x80  # -0.0
    engine.recall(0, BLOCKS, SLOTS, engine.marker())
    engine.fence([])
    assert wrong(engine.take_comparisons()) == {(0, 2)}, "zero with another sign is another page"


def test_a_comparison_that_never_ran_has_found_nothing_right() -> None:
    with simulated(Random(0), by_dma=True):
        engine = make_engine(CudaTransferEngine, "block_outermost", 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("flashmemory_vllm.transfer.kernel_sums.verify_checksums", lambda *_: None)
            engine.recall(0, BLOCKS, SLOTS, engine.marker())
        engine.fence([])
        assert wrong(engine.take_comparisons()) == {(place, block) for place in range(3) for block in (8, 2, 5)}


class Recorder(PageSums):
    """Remembers which blocks were compared."""

    def __init__(self) -> None:
        self.compared: list[list[int]] = []

    def store(self, group: int, blocks: Ids, slots: Ids) -> None:
        raise NotImplementedError

    def compare(self, group: int, blocks: Ids, slots: Ids) -> torch.Tensor:
        assert group == 0
        assert (blocks == slots).all()
        self.compared.append(blocks.tolist())
        return torch.zeros(1, len(blocks), dtype=torch.uint8)

    def compare_staged(self, layer: int, blocks: Ids, staged: torch.Tensor, rows: Ids) -> torch.Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("stride", [1, 16, 48])
def test_a_sample_reaches_every_block_and_takes_its_share(stride: int) -> None:
    """Blocks that are recalled in every 16th call only, as a request is that selects every 16 steps, included."""
    recorder = Recorder()
    checks = PageChecks(recorder, SAMPLED)
    blocks, others, calls = np.arange(64, dtype=np.int32), np.array([1000], np.int32), 64 * SAMPLED
    for _ in range(calls):
        recorder.compared.append([])
        checks.arrives(0, blocks, blocks, lambda: None)
        for _ in range(stride - 1):
            checks.arrives(0, others, others, lambda: None)
    times = np.bincount(np.concatenate([np.array(seen, np.int64) for seen in recorder.compared]), minlength=1001)[:64]
    assert times.sum() == pytest.approx(64 * calls / SAMPLED, rel=0.02)
    assert times.min() > 0.5 * calls / SAMPLED
    assert times.max() < 2 * calls / SAMPLED


def test_all_pages_are_compared_while_warming_up_and_the_results_dropped() -> None:
    engine = make_engine(CpuTransferEngine, "block_outermost", 1 << 20)
    with engine.warming_up():
        engine.recall(0, BLOCKS, SLOTS, engine.marker())
        engine.fence([])
        assert engine._checks is not None
        assert [len(comparison.blocks) for comparison in engine._checks._in_force] == [3]
    assert engine.take_comparisons() == ()
    engine.recall(0, BLOCKS, SLOTS, engine.marker())
    engine.fence([])
    assert sum(len(comparison.blocks) for comparison in engine.take_comparisons()) < 3
