"""One operation scores, remembers and chooses for all due rows; books that apply its lists have the device's sets."""

from __future__ import annotations

import numpy as np
import torch
from flashmemory_kernels.choose_sets import ChoicePolicy
from flashmemory_kernels.common.due_rows import Due, make_rows
from flashmemory_kernels.remember_shares import Channel, Channels

from flashmemory_vllm.residency.books import Books
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import Geometry
from flashmemory_vllm.runtime.choice import TILE, ChoiceSizes, ChoiceState, due_rows
from flashmemory_vllm.runtime.shape import AttentionShape

BLOCK, HEADS, KV_HEADS, DIM, WIDTH = 4, 4, 2, 8, 24
SHAPE = AttentionShape(("0", "1"), HEADS, KV_HEADS, DIM, 1.0, BLOCK, torch.float32, torch.device("cpu"))
SIZES = ChoiceSizes(num_anchors=1, num_groups=1, num_places=3, width=WIDTH, num_kept=4, max_rows=4, listed=4)
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
        self.state = ChoiceState(SIZES, SHAPE, (0,), Channels.of([Channel(decay)], torch.device("cpu")), (1.0,), policy)
        generator = torch.Generator().manual_seed(5)
        self.index = torch.randn(1, 60, KV_HEADS, BLOCK, DIM, generator=generator)
        self.state.block_ids[1], self.state.block_ids[2] = torch.arange(1, 25), torch.arange(30, 54)

    def look(self, place: int, position: int, block: int) -> None:
        """The token at a position asks for the first key of a block, in every head."""
        key = self.index[0, self.state.block_ids[place, block], :, 0]
        query = 20 * torch.nn.functional.normalize(key, dim=-1).repeat_interleave(HEADS // KV_HEADS, 0)
        self.state.queries[0, place, position % SIZES.num_kept] = query

    def ask(self, *given: dict[Due, int]) -> np.ndarray:
        """The list after one step."""
        rows = make_rows(given, len(given) + 1, TILE)
        self.state.remember(rows, self.index, None, due_rows(rows))
        return self.state.choose(rows, torch.zeros(0, dtype=torch.int32)).numpy().copy()

    def sets(self, place: int) -> list[int]:
        """The device's set."""
        return [int(block) for block in torch.nonzero(self.state.in_set[0, place])[:, 0]]


def test_what_each_row_looks_at_comes_and_is_remembered() -> None:
    asker = Asker(ChoicePolicy(), decay=0.9)
    asker.look(1, 80, 7)
    asker.look(2, 80, 4)
    asker.ask(asked(1, 80, IS_NEW=1), asked(2, 80, IS_NEW=1))
    assert 7 in asker.sets(1)
    assert 4 in asker.sets(2)
    asker.look(1, 81, 12)
    asker.ask(asked(1, 81, ELAPSED=1, NUM_KNOWN=NUM_FULL))
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
        ids = asker.state.block_ids[place].numpy()
        books.enter(place, ids, [np.array(asker.sets(place), np.int32)], sink=SINK, recent=RECENT)
    for step in range(1, 12):
        slots.begin_step()
        for place in (1, 2):
            asker.look(place, 80 + step, (5 * step + place) % (NUM_FULL - RECENT))
        rows = (asked(place, 80 + step, STEP=step, ELAPSED=1, NUM_KNOWN=NUM_FULL) for place in (1, 2))
        books.apply(step, asker.ask(*rows))
        books.check_integrity()
        for place in (1, 2):
            assert sorted(books.groups[0].positions_of(place).tolist()) == asker.sets(place)
    assert slots.num_evictions + slots.used(0) > 20
