"""StagingRing: every part is fetched and read once, in order, and no buffer is overwritten too early."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.transfer.engine import CpuTransferEngine, Ids, Marker
from flashmemory_vllm.transfer.host_pool import HostPool
from flashmemory_vllm.transfer.layout import PageLayout
from flashmemory_vllm.transfer.staging import HistoryPart, StagingRing, split_history
from tests.unit.transfer.pools import PAGE_BYTES, layer_outermost

NUM_BLOCKS, NUM_LAYERS = 40, 3


@dataclass(eq=False)
class Ticket:
    """A marker that knows what it was made for."""

    what: object

    def query(self) -> bool:
        return False

    def wait(self, stream: Any = None) -> None:
        del stream
        raise AssertionError("the engine waits, not the ring")

    def synchronize(self) -> None:
        raise AssertionError("the host never waits")


class RecordingEngine(CpuTransferEngine):
    """Performs a copy only when it is waited for, and remembers who waited for what."""

    def __init__(self, num_layers: int = NUM_LAYERS) -> None:
        layout = PageLayout(layer_outermost(num_layers))
        super().__init__(layout, HostPool(NUM_BLOCKS, layout))
        numbers = self.pool.pages.view(torch.float32)
        numbers.copy_(torch.arange(numbers.numel()).view(numbers.shape))
        self.gathers: list[tuple[int, list[int]]] = []
        # What was enqueued before a ring was made: the memory of its buffers may have been in use
        self.before_ring = Ticket("before")
        self.last_use: dict[int, Ticket] = {0: self.before_ring}
        self.read_now = 0
        self.under_way: dict[int, Ticket] = {}
        self._copies: dict[Ticket, Any] = {}

    def read(self, pages: torch.Tensor) -> None:
        """A kernel reads a buffer, whether anybody marks it or not."""
        self.read_now = pages.data_ptr()
        self.last_use[self.read_now] = Ticket("compute")

    def marker(self) -> Any:
        return self.last_use.setdefault(self.read_now, Ticket("compute"))

    def wait(self, marker: Marker | None) -> None:
        assert isinstance(marker, Ticket)
        self._copies.pop(marker)()
        self.under_way = {buffer: ticket for buffer, ticket in self.under_way.items() if ticket is not marker}

    def _gather_layer(
        self, layer: int, blocks: torch.Tensor, host_blocks: Ids, out: torch.Tensor, after: Marker | None
    ) -> Any:
        buffer = out.data_ptr()
        assert buffer not in self.under_way, "a buffer is filled twice"
        assert after is self.last_use.pop(buffer, self.before_ring), "a buffer is overwritten before it was drained"
        ticket = self.under_way[buffer] = Ticket((layer, host_blocks))
        self.gathers.append((layer, host_blocks.tolist()))
        self._copies[ticket] = lambda: CpuTransferEngine._gather_layer(self, layer, blocks, host_blocks, out, after)
        return ticket


def make_parts(engine: CpuTransferEngine, sizes: list[int], staging_blocks: int) -> list[HistoryPart]:
    """History of some rows, split."""
    generator = np.random.default_rng(len(sizes))
    rows = [generator.permutation(NUM_BLOCKS)[:size].astype(np.int32) for size in sizes]
    return [part for ids in rows for part in split_history(engine.upload(ids), ids, staging_blocks)]


@given(
    passes=st.lists(st.lists(st.integers(1, NUM_BLOCKS), max_size=3), min_size=1, max_size=3),
    num_buffers=st.integers(1, 4),
    staging_blocks=st.integers(1, 9),
)
def test_each_part_is_read_once_in_order_from_a_drained_buffer(
    passes: list[list[int]], num_buffers: int, staging_blocks: int
) -> None:
    engine = RecordingEngine()
    ring = StagingRing(engine, torch.zeros(num_buffers, staging_blocks, PAGE_BYTES, dtype=torch.uint8))
    for sizes in passes:
        parts = make_parts(engine, sizes, staging_blocks)
        schedule = [(layer, part) for layer in range(NUM_LAYERS) for part in parts]
        engine.gathers.clear()
        ring.begin(schedule)
        for index, (layer, part) in enumerate(schedule):
            # As far ahead as there are buffers, across layers, and before the first is asked for.
            assert len(engine.gathers) == min(len(schedule), index + num_buffers)
            with ring.part(layer, part) as pages:
                engine.read(pages)
                assert torch.equal(pages, engine.pool.layer_view(layer)[part.host_blocks])
        assert engine.gathers == [(layer, part.host_blocks.tolist()) for layer, part in schedule]


@given(num_blocks=st.integers(1, 200), staging_blocks=st.integers(1, 30))
def test_history_is_split_into_few_even_parts(num_blocks: int, staging_blocks: int) -> None:
    ids = np.arange(num_blocks, dtype=np.int32)
    parts = split_history(torch.from_numpy(ids.astype(np.int64)), ids, staging_blocks)
    assert np.concatenate([part.host_blocks for part in parts]).tolist() == ids.tolist()
    assert torch.cat([part.blocks for part in parts]).tolist() == ids.tolist()
    sizes = [len(part.host_blocks) for part in parts]
    assert len(sizes) == -(-num_blocks // staging_blocks)
    assert max(sizes) <= min(staging_blocks, min(sizes) + 1)


def test_what_the_schedule_does_not_have_next_is_refused() -> None:
    layout = PageLayout(layer_outermost(2))
    engine = CpuTransferEngine(layout, HostPool(NUM_BLOCKS, layout))
    ring = StagingRing(engine, torch.zeros(2, 4, PAGE_BYTES, dtype=torch.uint8))
    first, second = make_parts(engine, [3, 4], 4)
    ring.begin([(0, first), (0, second)])
    with (
        pytest.raises(IntegrityError, match="layer 0 asks for 4 streamed blocks; staged next is layer 0 with 3"),
        ring.part(0, second),
    ):
        pass
    ring.begin([])
    with (
        pytest.raises(IntegrityError, match="layer 1 asks for 3 streamed blocks; staged next is nothing"),
        ring.part(1, first),
    ):
        pass


def test_a_pass_that_was_cut_short_leaves_nothing_behind() -> None:
    layout = PageLayout(layer_outermost(1))
    engine = CpuTransferEngine(layout, HostPool(NUM_BLOCKS, layout))
    engine.pool.pages.copy_(torch.arange(NUM_BLOCKS)[:, None].expand(-1, PAGE_BYTES))
    ring = StagingRing(engine, torch.zeros(2, 4, PAGE_BYTES, dtype=torch.uint8))
    parts = make_parts(engine, [3, 4, 2], 4)
    ring.begin((0, part) for part in parts)
    with ring.part(0, parts[0]):
        pass
    ring.begin((0, part) for part in parts)
    for part in parts:
        with ring.part(0, part) as pages:
            assert pages[:, 0].tolist() == part.host_blocks.tolist()
