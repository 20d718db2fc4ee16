"""One operation scores, remembers and chooses for all due rows; books that apply its lists have the device's sets."""

from __future__ import annotations

import numpy as np
import torch
from flashmemory_kernels.choose_sets import ChoicePolicy
from flashmemory_kernels.common.due_rows import Due, make_rows
from flashmemory_kernels.remember_shares import Channel, Channels

from flashmemory_vllm.indexer.places import DueRows, MemoryKind
from flashmemory_vllm.indexer.shares import TILE, KeyIndex, remember_rows
from flashmemory_vllm.residency.books import Books
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import Geometry
from flashmemory_vllm.runtime.choice import ChoiceSizes, ChoiceState
from flashmemory_vllm.runtime.shape import AttentionShape

BLOCK, HEADS, KV_HEADS, DIM, WIDTH = 4, 4, 2, 8, 24
SHAPE = AttentionShape(("0", "1"), HEADS, KV_HEADS, DIM, 1.0, BLOCK, torch.float32, torch.device("cpu"))
SIZES = ChoiceSizes(num_channels=1, num_groups=1, num_places=3, width=WIDTH, max_rows=4, listed=4)
NUM_KEPT = 4
NUM_FULL, SINK, RECENT, WANT = 20, 1, 2, 3


def asked(place: int, position: int, **more: int) -> dict[Due, int]:
    """A row with one query that knows all full blocks."""
    fields = {
        "PLACE": place, "POSITION": position, "NUM_QUERIES": 1, "NUM_BLOCKS": NUM_FULL, "SINK_END": SINK,
        "FIRST_RECENT": NUM_FULL + 1 - RECENT, "END": NUM_FULL + 1, "WANT": WANT, "CAP": 4, "LONG_START": -1,
    }  # fmt: skip
    return {Due[name]: value for name, value in (fields | more).items()}


class Asker:
    """Places 1 and 2 with blocks of their own; keys at random, queries that look for the key of one block."""

    def __init__(self, policy: ChoicePolicy, decay: float) -> None:
        queries, ids = torch.zeros(1, 3, NUM_KEPT, HEADS, DIM), torch.zeros(3, WIDTH, dtype=torch.int32)
        self._channels = Channels.of([Channel(decay)], "cpu")
        self.state = ChoiceState(SIZES, queries, ids, MemoryKind((Channel(decay),)), policy)
        generator = torch.Generator().manual_seed(5)
        self.index = torch.randn(1, 60, KV_HEADS, BLOCK, DIM, generator=generator)
        ids[1], ids[2] = torch.arange(1, 25), torch.arange(30, 54)

    def look(self, place: int, position: int, block: int) -> None:
        """The token at a position asks for the first key of a block, in every head."""
        key = self.index[0, self.state.places.block_ids[place, block], :, 0]
        query = 20 * torch.nn.functional.normalize(key, dim=-1).repeat_interleave(HEADS // KV_HEADS, 0)
        self.state.places.queries[0, place, position % NUM_KEPT] = query

    def ask(self, *given: dict[Due, int]) -> np.ndarray:
        """The list after one step."""
        rows, nothing = make_rows(given, len(given), TILE), np.zeros(len(given), np.int32)
        fields = rows.numpy().copy()
        unscored = np.flatnonzero(fields[:, Due.NUM_QUERIES] == 0).tolist()
        self.state.look_up(rows, [slice(row, row + 1) for row in unscored])
        on_device = torch.from_numpy(nothing)
        due = DueRows(fields, rows, ("",) * len(given), nothing, torch.stack((on_device, on_device)), is_entering=False)
        index = KeyIndex(self.index, None, torch.zeros(1, dtype=torch.int32), SHAPE.softmax_scale)
        remember_rows(due, self.state.places, index, self._channels)
        out = self.state.choose(rows, None, torch.zeros(0, dtype=torch.int32))[len(given) :]
        self.state.keep_known(rows)
        return out.view(len(given), 1, SIZES.columns).numpy().copy()

    def sets(self, place: int) -> list[int]:
        """The device's set."""
        return [int(block) for block in torch.nonzero(self.state.places.in_set[0, place])[:, 0]]


def test_what_each_row_looks_at_comes_and_is_remembered() -> None:
    asker = Asker(ChoicePolicy(), decay=0.9)
    asker.look(1, 80, 7)
    asker.look(2, 80, 4)
    asker.ask(asked(1, 80, IS_NEW=1), asked(2, 80, IS_NEW=1))
    assert 7 in asker.sets(1)
    assert 4 in asker.sets(2)
    asker.look(1, 81, 12)
    asker.ask(asked(1, 81, ELAPSED=1, NUM_KNOWN=-1))
    assert {7, 12} <= set(asker.sets(1))
    assert 4 in asker.sets(2)


def test_books_that_apply_its_lists_have_its_sets() -> None:
    asker = Asker(ChoicePolicy(hysteresis=1.0), decay=0.5)
    geometry = Geometry(60, 40, 1, BLOCK)
    slots = SlotTable(geometry)
    slots.begin_step()
    slots.mark_written_back(np.arange(1, 60, dtype=np.int32))
    books = Books(geometry, slots, SIZES.num_places, WIDTH)
    for place in (1, 2):
        asker.look(place, 80, 3 + place)
        asker.ask(asked(place, 80, IS_NEW=1))
        ids = asker.state.places.block_ids[place, : NUM_FULL + 1].numpy()
        books.enter(place, ids, [np.array(asker.sets(place), np.int32)], sink=SINK, recent=RECENT)
    books.settle()
    for step in range(1, 12):
        slots.begin_step()
        for place in (1, 2):
            asker.look(place, 80 + step, (5 * step + place) % (NUM_FULL - RECENT))
        rows = (asked(place, 80 + step, STEP=step, ELAPSED=1, NUM_KNOWN=-1) for place in (1, 2))
        books.apply(step, asker.ask(*rows))
        books.settle()
        books.check_integrity()
        for place in (1, 2):
            assert sorted(books.groups[0].positions_of(place).tolist()) == asker.sets(place)
    assert slots.num_evictions + slots.used(0) > 20


def test_who_has_failed_is_told_once() -> None:
    state, nothing = Asker(ChoicePolicy(), decay=0.9).state, torch.zeros(0, dtype=torch.int32)
    rows = make_rows([asked(1, 80, NUM_KNOWN=15), asked(2, 80, NUM_KNOWN=15)], 2, TILE)
    assert state.choose(rows, None, nothing)[:2].tolist() == [0, 0]
    assert state.choose(rows, torch.tensor([0, 2]), nothing)[:2].tolist() == [0, 2]
    assert rows[:, Due.NUM_BLOCKS].tolist() == [NUM_FULL, 15]
    for count in (1, 2):
        assert state.choose(rows[:count], None, nothing)[:count].tolist() == [0] * count


def test_sizes_count_what_is_allocated() -> None:
    state = Asker(ChoicePolicy(), 0.5).state
    held = [state.places.memory, state.places.in_set, state.known, state._out, state._weights]
    assert SIZES.num_bytes == sum(tensor.nbytes for tensor in held)
