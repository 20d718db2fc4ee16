"""Books and a device one step behind: every read finds its block, and both sides agree on every set."""

from __future__ import annotations

from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmemory_vllm.residency.books import Books
from flashmemory_vllm.residency.lists import NOBODY, pairs_of
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import Copies, Geometry, IntArray
from tests.unit.residency.device_twin import Ask, DeviceRow, DeviceStep, DeviceTwin

WIDTH, SINK, NUM_SHARED, NUM_STEPS = 32, 1, 6, 40


def ids(*numbers: int) -> IntArray:
    return np.array(numbers, np.int32)


class History:
    """Requests of a world begin, grow, share a prefix and end; lists come two steps late, copies early or late."""

    def __init__(self, seed: int) -> None:
        self.random = random = Random(seed)
        self.block_size, self.num_places = random.choice([1, 2, 4]), random.randint(1, 4)
        self.ratio, self.tau, self.most = (
            random.choice([0.2, 0.35, 0.6]),
            random.choice([1, 2, 4]),
            random.choice([1, 2, 8]),
        )
        num_groups, num_blocks = random.randint(1, 3), self.num_places * WIDTH * 2 + 40
        # Sets, one block more while a row has grown, what is fetched in a step, and a new request's own
        num_slots = 1 + self.num_places * (self.budget(WIDTH) + 2 + self.most + 4)
        geometry = Geometry(num_blocks, num_slots, num_groups, self.block_size)
        self.slots = SlotTable(geometry)
        self.books = Books(geometry, self.slots, self.num_places, WIDTH)
        self.device = DeviceTwin(random, num_groups, self.num_places, WIDTH, (num_blocks, num_slots))
        self.free_ids = list(range(1, num_blocks))
        self.shared = [self.free_ids.pop() for _ in range(NUM_SHARED)]
        self.device.write(self.shared)
        self.slots.mark_written_back(ids(*self.shared))
        self.tokens, self.blocks = [0] * self.num_places, [list[int]() for _ in range(self.num_places)]
        self.active: set[int] = set()
        self.entering: dict[int, list[Copies]] = {}
        self.prompts: list[tuple[list[int], list[Copies]]] = []
        self.pending: list[DeviceStep] = []
        self.flying: list[Copies] = []
        self.num_rested = 0
        # What the device's tables hold, which are changed by edits only
        self.edited = np.zeros((num_groups, self.num_places, WIDTH + 1), np.int32)

    def budget(self, end: int) -> int:
        return min(end, max(int(self.ratio * end), SINK + 3))

    def recent(self, end: int) -> int:
        return 2 if self.budget(end) < 12 else 3

    def step(self, number: int) -> None:
        """The host's step, with the device's before it somewhere on the way; see selection lists in `Books`."""
        random, books = self.random, self.books
        self.slots.begin_step()
        for place in [one for one in self.active if random.random() < 0.05 or self.is_long(one)]:
            self.finish(place)
        if self.entering:
            self.run_device()
            self.enter(number - 1)
        if number - 2 in self.device.lists:
            books.apply(number - 2, self.device.lists.pop(number - 2))
        grown = self.grow()
        taken = books.settle()
        self.issue([*taken.recalls, *taken.prefetches])
        asks = [self.ask(place) for place in sorted(self.active) if (number + place) % self.tau == 0 or place in grown]
        rows = [self.row(place) for place in sorted(self.active)]
        asks += [self.begin(place) for place in range(self.num_places) if self.is_free(place) and random.random() < 0.3]
        self.slots.check_integrity()
        books.check_integrity()
        self.check_edits()
        assert all(
            (entries.count[place] > 0) == (place in self.active)
            for entries in books.groups
            for place in range(self.num_places)
        )
        self.pending.append(DeviceStep(number, rows, self.prompts, asks))
        self.prompts = []
        while len(self.pending) > 1:
            self.run_device()
        for copies in self.flying:  # the fence
            self.device.load(copies)
        self.flying = []
        full = [self.blocks[one][-1] for one in self.active if self.tokens[one] % self.block_size == 0]
        self.slots.mark_written_back(ids(*full))
        self.compare()

    def check_edits(self) -> None:
        for group, entries in enumerate(self.books.groups):
            place, at, slots = entries.take_edits().T
            self.edited[group, place, at] = slots
            for active in self.active:
                assert (self.edited[group, active, : entries.count[active]] == entries.slots_of(active)).all()

    def is_long(self, place: int) -> bool:
        return self.tokens[place] >= WIDTH * self.block_size - 1

    def is_free(self, place: int) -> bool:
        return place not in self.active and place not in self.entering

    def run_device(self) -> None:
        if self.pending:
            self.device.run(self.pending.pop(0), self.block_size, self.books.epoch)

    def issue(self, copies: list[Copies]) -> None:
        """A copy into slots that have rested may land at any time; one into others waits for the step before."""
        for one in copies:
            self.num_rested += one.rested > 0
            if one.rested > 0 and self.random.random() < 0.7:
                self.device.load(one)
            else:
                self.flying.append(one)

    def grow(self) -> list[int]:
        grown = []
        for place in sorted(self.active):
            self.tokens[place] += 1
            if self.end(place) > len(self.blocks[place]):
                self.blocks[place].append(self.free_ids.pop(self.random.randrange(len(self.free_ids))))
                grown.append(place)
        if grown:
            new = ids(*(self.blocks[place][-1] for place in grown))
            self.slots.drop(new)
            ends = [self.end(place) for place in grown]
            recent = ids(
                *(
                    min(self.recent(end), self.books.groups[0].recent[place] + 1)
                    for place, end in zip(grown, ends, strict=True)
                )
            )
            self.books.append(ids(*grown), ids(*ends) - 1, new, recent)
        return grown

    def end(self, place: int) -> int:
        return -(-self.tokens[place] // self.block_size)

    def row(self, place: int) -> DeviceRow:
        groups = self.books.groups
        return DeviceRow(
            place,
            int(self.books.epoch[place]),
            self.tokens[place],
            list(self.blocks[place]),
            [entries.slots_of(place).copy() for entries in groups],
            [entries.positions_of(place).copy() for entries in groups],
        )

    def ask(self, place: int) -> Ask:
        end = self.end(place)
        recent = int(self.books.groups[0].recent[place])
        return Ask(place, int(self.books.epoch[place]), end, self.budget(end), recent, SINK, self.most, is_new=False)

    def begin(self, place: int) -> Ask:
        """A prompt in one step, some of it shared; what it writes last it holds until its first list has come."""
        num_shared = self.random.choice([0, 3, NUM_SHARED])
        self.tokens[place] = (num_shared + self.random.randint(4, 9)) * self.block_size + self.random.randrange(
            self.block_size
        )
        own = [self.free_ids.pop() for _ in range(self.end(place) - num_shared)]
        self.slots.drop(ids(*own))
        self.blocks[place] = [*self.shared[:num_shared], *own]
        recent = self.recent(self.end(place))
        self.entering[place] = [
            self.slots.hold_fresh(group, ids(*own[-recent:])) for group in range(len(self.books.groups))
        ]
        num_full = self.tokens[place] // self.block_size - num_shared
        self.slots.mark_written_back(ids(*own[:num_full]))
        self.prompts.append((own, self.entering[place]))
        end = self.end(place)
        return Ask(place, int(self.books.epoch[place]), end, self.budget(end), recent, SINK, WIDTH, is_new=True)

    def enter(self, number: int) -> None:
        """The rows of a list that are new; the others wait for their turn."""
        rows = self.device.lists[number]
        is_new = np.isin(rows[:, 0, 0], list(self.entering))
        for row in rows[is_new]:
            place = int(row[0, 0])
            recent, end = self.entering[place][0].blocks.size, self.end(place)
            chosen = [
                np.concatenate((np.arange(SINK), pairs_of(of_group[None]).come, np.arange(end - recent, end)))
                for of_group in row
            ]
            self.books.enter(
                place, ids(*self.blocks[place]), [one.astype(np.int32) for one in chosen], sink=SINK, recent=recent
            )
            for held in self.entering[place]:
                self.slots.unpin(held.group, held.blocks)
            self.active.add(place)
        self.entering = {}
        self.device.lists[number] = rows[~is_new]

    def finish(self, place: int) -> None:
        """Its step that still runs writes into a slot that is free by now."""
        self.books.leave(place)
        self.active.discard(place)
        num_full = self.tokens[place] // self.block_size
        self.slots.drop(ids(*self.blocks[place][num_full:]))
        self.free_ids += [one for one in self.blocks[place] if one not in self.shared]

    def compare(self) -> None:
        """The host's sets are the device's once the lists on their way are applied, but for blocks begun since."""
        for group, entries in enumerate(self.books.groups):
            for place in self.active:
                mine, end = set(entries.positions_of(place).tolist()), self.end(place)
                for number in sorted(self.device.lists):
                    rows = self.device.lists[number]
                    rows = rows[(rows[:, 0, 0] == place) & (rows[:, 0, 1] == self.books.epoch[place])]
                    for _, come, go in zip(*pairs_of(rows[:, group]), strict=True):
                        mine = (mine | {int(come)}) - {int(go), NOBODY}
                theirs = set(np.flatnonzero(self.device.in_set[group, place]).tolist())
                assert (mine ^ theirs) <= {end - 1, end - 2}, (place, mine, theirs)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_read_finds_its_block_and_both_sides_agree(seed: int) -> None:
    history = History(seed)
    for number in range(NUM_STEPS):
        history.step(number)


def test_most_copies_go_into_slots_that_have_rested() -> None:
    history = History(11)
    for number in range(NUM_STEPS):
        history.step(number)
    assert history.num_rested > 5
