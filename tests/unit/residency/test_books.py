"""Books and a device one step behind: every read finds its block, and both sides agree on every set."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.books import HEADER, NOBODY, Books, pairs_of
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
            self.issue(books.apply(number - 2, self.device.lists.pop(number - 2)))
        grown = self.grow()
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
            self.issue(
                self.books.enter(
                    place, ids(*self.blocks[place]), [one.astype(np.int32) for one in chosen], sink=SINK, recent=recent
                )
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


def entered(num_slots: int = 20) -> tuple[Books, SlotTable]:
    """A request of ten blocks in place 1 that reads 0 of the sink, 3, 5, and 8, 9; all ten are on the host."""
    geometry = Geometry(40, num_slots, 1, 4)
    slots = SlotTable(geometry)
    slots.begin_step()
    slots.mark_written_back(np.arange(1, 30, dtype=np.int32))
    books = Books(geometry, slots, 3, 16)
    (copies,) = books.enter(1, np.arange(1, 11, dtype=np.int32), [ids(0, 3, 5, 8, 9)], sink=1, recent=2)
    assert copies.blocks.tolist() == [1, 4, 6, 9, 10]
    return books, slots


def test_a_slot_that_was_given_up_has_rested_for_a_step_in_the_next_one() -> None:
    books, slots = entered(num_slots=8)
    assert books.apply(0, listed([4, 6], [3, 5]))[0].rested == 0
    slots.begin_step()
    # Into the slot of 3, which the tables of the step before do not name any more
    assert books.apply(1, listed([1], [4]))[0].rested == 1
    slots.begin_step()
    # Into those of 5 and 4: of two slots the one counts that was read last
    assert books.apply(2, listed([2, 7], [6, 1]))[0].rested == 1


def listed(come: list[int], go: list[int], place: int = 1, epoch: int = 0) -> IntArray:
    """A list of one row with room for four positions."""
    row = np.full((1, 1, HEADER + 8), NOBODY, np.int32)
    row[0, 0, :HEADER] = place, epoch, 0, len(come), len(go), 0
    row[0, 0, HEADER : HEADER + len(come)] = come
    row[0, 0, HEADER + 4 : HEADER + 4 + len(go)] = go
    return row


def table(books: Books) -> list[int]:
    return [int(position) for position in books.groups[0].positions_of(1)]


def test_who_comes_takes_the_entry_of_who_goes() -> None:
    books, slots = entered()
    (copies,) = books.apply(0, listed([4], [3]))
    assert (copies.blocks.tolist(), table(books)) == ([5], [0, 4, 5, 8, 9])
    books.groups[0].take_edits()
    books.apply(1, listed([6, 7], [4]))
    assert table(books) == [0, 6, 5, 7, 8, 9]
    assert sorted(map(tuple, books.groups[0].take_edits()[:, :2].tolist())) == [(1, 1), (1, 3), (1, 4), (1, 5)]
    assert books.apply(2, listed([], [6, 5])) == []
    assert table(books) == [0, 7, 8, 9]
    books.check_integrity()
    assert (books.pins() == slots.pins).all()


def test_a_block_begun_pushes_the_oldest_recent_one_to_the_far_ones() -> None:
    books, _ = entered()
    books.append(ids(1), ids(10), ids(30), ids(2))
    assert table(books) == [0, 3, 5, 8, 9, 10]
    books.apply(0, listed([], [8]))
    assert table(books) == [0, 3, 5, 9, 10]
    books.check_integrity()


@pytest.mark.parametrize(
    ("come", "go"),
    [
        ([3], [5]),
        ([4], [4]),
        ([9], [3]),
        ([4], [0]),
        ([4], [9]),
        ([4, 4], [3, 5]),
        ([4, 6], [3, 3]),
        ([99], [3]),
        ([-7], [3]),
    ],
)
def test_a_list_that_does_not_follow_from_the_sets_changes_nothing(come: list[int], go: list[int]) -> None:
    books, slots = entered()
    pins = slots.pins.copy()
    with pytest.raises(IntegrityError, match="does not follow from their sets"):
        books.apply(0, listed(come, go))
    assert table(books) == [0, 3, 5, 8, 9]
    assert (slots.pins == pins).all()
    books.apply(0, listed([4], [3]))


def test_a_list_is_applied_once_and_only_for_the_tenant_it_was_made_for() -> None:
    books, slots = entered()
    books.apply(3, listed([4], [3]))
    for step in (3, 2):
        with pytest.raises(IntegrityError, match=f"the list of step {step} comes after that of step 3"):
            books.apply(step, listed([6], [5]))
    books.leave(1)
    assert not slots.pins.any()
    assert books.apply(4, listed([6], [5])) == []
    with pytest.raises(IntegrityError, match="does not follow"):
        books.apply(5, listed([6], [5], epoch=1))
    with pytest.raises(IntegrityError, match="places"):
        books.apply(6, listed([6], [5], place=7))


def test_recent_blocks_are_never_more_than_their_order_is_known_of() -> None:
    books, _ = entered()
    with pytest.raises(IntegrityError, match="recent blocks, there were"):
        books.append(ids(1), ids(10), ids(30), ids(4))


def test_shared_blocks_have_one_slot_and_a_pin_for_each_table() -> None:
    books, slots = entered()
    books.enter(2, np.arange(1, 11, dtype=np.int32), [ids(0, 3, 6, 8, 9)], sink=1, recent=2)
    both = np.concatenate((listed([4], [3]), listed([4], [3], place=2)))
    (copies,) = books.apply(0, both)
    assert copies.blocks.tolist() == [5]
    assert slots.pins[0, slots.lut[0, 5]] == 2
    assert slots.pins[0, slots.lut[0, 4]] == 0
    books.leave(1)
    books.check_integrity()
    assert slots.pins[0, slots.lut[0, 5]] == 1
