"""CudaTransferEngine on simulated streams: whatever order the device chooses, the result is that of no overlap."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmemory_vllm.residency.types import Copies
from flashmemory_vllm.transfer import cuda_engine
from flashmemory_vllm.transfer.checksums import Comparison
from flashmemory_vllm.transfer.cuda_engine import CudaTransferEngine
from flashmemory_vllm.transfer.engine import CpuTransferEngine, Ids, TransferCounters, TransferEngine
from flashmemory_vllm.transfer.host_pool import HostPool
from flashmemory_vllm.transfer.layout import PageLayout
from flashmemory_vllm.transfer.step_ends import StepEnds
from tests.unit.transfer.pools import NUM_SLOTS, PAGE_BYTES, block_outermost
from tests.unit.transfer.streams import Device, Stream, simulated

NUM_BLOCKS, NUM_STEPS = 9, 6
GROUPS = [[0], [1]]


class Worker:
    """Runs steps on an engine as the runtime does, the model's kernels replaced by reads and writes of slots."""

    def __init__(self, engine_cls: type[TransferEngine], device: Device | None, compared: int | None = 1) -> None:
        layout = PageLayout(block_outermost(len(GROUPS)), GROUPS)
        self.engine = engine_cls(layout, HostPool(NUM_BLOCKS, layout), compared)
        self._device = device
        self._staging = torch.zeros(2, NUM_BLOCKS, PAGE_BYTES, dtype=torch.uint8)
        self._drained = [self.engine.marker(), self.engine.marker()]
        self._ends = StepEnds(self.engine)
        self._last_use = np.zeros((len(GROUPS), NUM_SLOTS), np.int64)
        self.seen: list[list[float]] = []
        self.compared: list[Comparison] = []

    def compute(self, kernel: object) -> None:
        assert callable(kernel)
        if self._device is None:
            kernel()
        else:
            self._device.enqueue(kernel)

    def read(self, pages: torch.Tensor) -> None:
        self.compute(lambda: self.seen.append(pages.view(torch.float32)[:, 0].tolist()))

    def write(self, group: int, slots: Ids, value: float) -> None:
        pages = self.engine.layout.page_view(group)
        for offset, slot in enumerate(slots):
            self.compute(lambda page=pages[slot], number=value + offset: page.view(torch.float32).fill_(number))

    def step(self, random: Random, number: int) -> None:
        """Recalls, fence, attention over slots and streamed history, write-backs."""
        engine, plans = self.engine, [_Plan(random) for _ in GROUPS]
        for group, plan in enumerate(plans):
            for blocks, slots in (plan.recalls, plan.prefetches):
                rested = number - 1 - int(self._last_use[group, slots].max(initial=0))
                engine.recall(group, blocks, slots, self._ends.before(rested))
            for _, slots in (plan.recalls, plan.prefetches, plan.fresh):
                self._last_use[group, slots] = number
        engine.fence([Copies(group, *plan.fresh) for group, plan in enumerate(plans)])
        fetched = []
        for group, plan in enumerate(plans):
            ids, buffer = plan.gathered, self._staging[group]
            fetched.append(engine.gather_layer(group, engine.upload(ids), ids, buffer, self._drained[group]))
        for group, plan in enumerate(plans):
            self.write(group, plan.fresh[1], 100.0 * number + 10 * group)
            for slot in (*plan.fresh[1], *plan.recalls[1], *plan.prefetches[1]):
                self.read(engine.layout.page_view(group)[slot : slot + 1])
            engine.wait(fetched[group])
            self.read(self._staging[group, : len(plan.gathered)])
            self._drained[group] = engine.marker()
        for group, plan in enumerate(plans):
            engine.write_back(group, *plan.fresh)
        self._ends.add()
        self.compared += engine.take_comparisons()

    def wrong(self) -> list[tuple[list[int], list[list[bool]]]]:
        """Blocks and verdicts of all comparisons so far, in a fixed order."""
        found = [(comparison.blocks.tolist(), comparison.wrong_pages().tolist()) for comparison in self.compared]
        return sorted(found)


class _Plan:
    """What one step does in one group: blocks and slots of one kind are none of another's."""

    def __init__(self, random: Random) -> None:
        slots = np.array(random.sample(range(NUM_SLOTS), NUM_SLOTS), np.int32)
        blocks = np.array(random.sample(range(NUM_BLOCKS), NUM_BLOCKS), np.int32)
        counts = [random.randint(0, 2) for _ in range(3)]
        ends = np.cumsum([0, *counts])
        kinds = [(blocks[start:end], slots[start:end]) for start, end in pairwise(ends)]
        self.recalls, self.prefetches, self.fresh = kinds
        self.gathered = np.array(random.sample(range(NUM_BLOCKS), 3), np.int32)
        # This step's own blocks are not in the host pool yet.
        self.gathered = self.gathered[~np.isin(self.gathered, self.fresh[0])]


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), order=st.integers(0, 2**32), by_dma=st.booleans())
def test_overlap_changes_nothing_that_is_read_or_kept(seed: int, order: int, by_dma: bool) -> None:
    plain = Worker(CpuTransferEngine, None)
    steps = Random(seed)
    for number in range(1, NUM_STEPS):
        plain.step(steps, number)
    with simulated(Random(order), by_dma=by_dma) as device, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_engine, "WRITE_BACK_BYTES", 1)
        worker = Worker(CudaTransferEngine, device)
        steps = Random(seed)
        for number in range(1, NUM_STEPS):
            worker.step(steps, number)
        worker.engine.synchronize()
        device.current.synchronize()
        assert worker.wrong() == plain.wrong()
    assert worker.seen == plain.seen
    assert torch.equal(worker.engine.pool.pages, plain.engine.pool.pages)
    for group in range(len(GROUPS)):
        assert torch.equal(worker.engine.layout.page_view(group), plain.engine.layout.page_view(group))


class Idle(Random):
    """A device that does nothing until it is waited for."""

    def choice(self, seq: Sequence[int]) -> int:  # type: ignore[override]
        return seq[0]


def _waits(stream: Stream) -> bool:
    """Whether a stream, having done all that it may, waits for another one."""
    while stream.is_ready:
        stream.advance()
    return bool(stream.queue)


def test_a_fence_waits_for_the_write_backs_that_it_is_told_of_and_no_other() -> None:
    with simulated(Idle(0), by_dma=True) as device:
        worker = Worker(CudaTransferEngine, device)
        engine, compute = worker.engine, device.current
        engine.write_back(0, np.array([1, 2]), np.array([3, 4]))
        compute.queue.clear()
        engine.fence([Copies(0, np.array([7], np.int32), np.array([5], np.int32))])
        engine.fence([Copies(1, np.array([7], np.int32), np.array([3], np.int32))])
        assert not compute.queue
        engine.fence([Copies(0, np.array([7], np.int32), np.array([4], np.int32))])
        assert sum(isinstance(work, tuple) for work in compute.queue) == 1
        assert engine.counters.late_fences == 0


def test_pieces_of_a_write_back_land_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_engine, "WRITE_BACK_BYTES", 1)
    with simulated(Idle(0), by_dma=True) as device:
        engine = Worker(CudaTransferEngine, device).engine
        device.current.synchronize()
        engine.write_back(0, np.array([1, 2]), np.array([3, 4]))
        device.current.synchronize()
        assert isinstance(engine, CudaTransferEngine)
        last, first = cast("list[Stream]", engine._write_backs)
        while last.is_ready:
            last.advance()
        assert last.queue, "the second piece did not wait for the first"
        first.synchronize()
        last.synchronize()
        assert not last.queue


def test_warming_up_is_not_counted_later_either() -> None:
    with simulated(Idle(0), by_dma=False) as device:
        engine = Worker(CudaTransferEngine, device).engine
        with engine.warming_up():
            engine.write_back(0, np.array([1]), np.array([1]))
            engine.recall(0, np.array([1]), np.array([1]), engine.marker())
            engine.fence([])
        device.current.synchronize()
        engine.fence([])
        assert engine.counters == TransferCounters()


def test_a_fence_is_late_if_the_device_waits_for_a_recall() -> None:
    with simulated(Idle(0), by_dma=False) as device:
        engine = Worker(CudaTransferEngine, device, compared=None).engine
        engine.recall(0, np.array([1]), np.array([1]), None)
        engine.fence([])
        assert (engine.counters.late_fences, engine.counters.stall_seconds) == (0, 0.0)
        device.current.synchronize()  # which comes to the fence before the copy is made
        engine.fence([])
        assert (engine.counters.late_fences, engine.take_late_fences()) == (1, [1])
        assert engine.counters.stall_seconds == pytest.approx(1e-3), "one copy ran while the model's stream waited"
        assert engine.take_late_fences() == []


def test_a_recall_into_slots_that_have_rested_waits_for_nobody() -> None:
    with simulated(Idle(0), by_dma=False) as device:
        worker = Worker(CudaTransferEngine, device, compared=None)
        engine, ends = worker.engine, StepEnds(worker.engine)
        assert isinstance(engine, CudaTransferEngine)
        worker.read(engine.layout.page_view(0)[1:2])
        ends.add()
        device.current.synchronize()
        worker.read(engine.layout.page_view(0)[2:3])
        ends.add()
        engine.recall(0, np.array([1]), np.array([1]), ends.before(1))
        engine.fence([])
        recalls = cast("Stream", engine._recalls)
        assert not _waits(recalls)
        assert len(worker.seen) == 1, "the copy has waited for the step that runs"
        device.current.synchronize()
        engine.fence([])
        assert engine.counters.late_fences == 0
        worker.read(engine.layout.page_view(0)[2:3])
        ends.add()
        engine.recall(0, np.array([1]), np.array([2]), ends.before(0))
        assert _waits(recalls), "the copy has not waited for the reader of its slot"
        engine.synchronize()
        assert len(worker.seen) == 3


@pytest.mark.parametrize("by_dma", [False, True])
def test_a_gather_waits_for_the_reader_of_its_buffer(by_dma: bool) -> None:
    with simulated(Idle(0), by_dma=by_dma) as device:
        worker = Worker(CudaTransferEngine, device, compared=None)
        engine, buffer, blocks = worker.engine, torch.zeros(1, PAGE_BYTES, dtype=torch.uint8), np.array([1], np.int32)
        assert isinstance(engine, CudaTransferEngine)
        engine.pool.pages.view(torch.float32).fill_(7.0)
        device.current.synchronize()
        worker.read(buffer)
        filled = engine.gather_layer(0, engine.upload(blocks), blocks, buffer, engine.marker())
        assert _waits(cast("Stream", engine._gathers))
        engine.wait(filled)
        worker.read(buffer)
        device.current.synchronize()
    assert worker.seen == [[0.0], [7.0]]
