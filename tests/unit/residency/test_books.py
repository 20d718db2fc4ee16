"""Tables that lists change: who comes takes the entry of who goes, and nonsense changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.books import Books
from flashmemory_vllm.residency.lists import HEADER, NOBODY
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import Copies, Geometry, IntArray


def ids(*numbers: int) -> IntArray:
    return np.array(numbers, np.int32)


def entered(num_slots: int = 20) -> tuple[Books, SlotTable]:
    """A request of ten blocks in place 1 that reads 0 of the sink, 3, 5, and 8, 9; all ten are on the host."""
    geometry = Geometry(40, num_slots, 1, 4)
    slots = SlotTable(geometry)
    slots.begin_step()
    slots.mark_written_back(np.arange(1, 30, dtype=np.int32))
    books = Books(geometry, slots, 3, 16)
    books.enter(1, np.arange(1, 11, dtype=np.int32), [ids(0, 3, 5, 8, 9)], sink=1, recent=2)
    assert books.settle().recalls[0].blocks.tolist() == [1, 4, 6, 9, 10]
    return books, slots


def test_a_slot_that_was_given_up_has_rested_for_a_step_in_the_next_one() -> None:
    books, slots = entered(num_slots=8)
    # Both slots that are left, and one of those that are given up
    (copies,) = applied(books, 0, listed([1, 4, 6], [3, 5]))
    assert copies.rested == 0
    slots.begin_step()
    # Into the slot of 5, which the tables of the step before do not name any more
    assert applied(books, 1, listed([2], [4]))[0].rested == 1
    slots.begin_step()
    assert applied(books, 2, listed([7], [6]))[0].rested == 1


def listed(come: list[int], go: list[int], place: int = 1, epoch: int = 0) -> IntArray:
    """A list of one row with room for four positions."""
    row = np.full((1, 1, HEADER + 8), NOBODY, np.int32)
    row[0, 0, :HEADER] = place, epoch, 0, len(come), len(go), 0
    row[0, 0, HEADER : HEADER + len(come)] = come
    row[0, 0, HEADER + 4 : HEADER + 4 + len(go)] = go
    return row


def applied(books: Books, step: int, rows: IntArray) -> list[Copies]:
    """What a list brings."""
    books.apply(step, rows)
    return books.settle().prefetches


def table(books: Books) -> list[int]:
    return [int(position) for position in books.groups[0].positions_of(1)]


def test_who_comes_takes_the_entry_of_who_goes() -> None:
    books, slots = entered()
    (copies,) = applied(books, 0, listed([4], [3]))
    assert (copies.blocks.tolist(), table(books)) == ([5], [0, 4, 5, 8, 9])
    books.groups[0].take_edits()
    applied(books, 1, listed([6, 7], [4]))
    assert table(books) == [0, 6, 5, 7, 8, 9]
    assert sorted(map(tuple, books.groups[0].take_edits()[:, :2].tolist())) == [(1, 1), (1, 3), (1, 4), (1, 5)]
    assert applied(books, 2, listed([], [6, 5])) == []
    assert table(books) == [0, 7, 8, 9]
    books.check_integrity()
    assert (books.pins() == slots.pins).all()


def test_a_block_begun_pushes_the_oldest_recent_one_to_the_far_ones() -> None:
    books, _ = entered()
    books.append(ids(1), ids(10), ids(30), ids(2))
    assert books.settle().fresh[0].blocks.tolist() == [30]
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


@pytest.mark.parametrize(
    ("place", "positions"),
    [
        (1, [0, 4, 8, 9]),
        (2, [3, 5, 8, 9]),
        (2, [0, 5, 3, 8, 9]),
        (2, [0, 3, 3, 8, 9]),
        (2, [0, 3, 5, 8]),
        (2, [0, 3, 5, 8, 9, 99]),
        (2, [0, -7, 8, 9]),
        (2, [9]),
    ],
)
def test_a_first_list_that_says_nonsense_changes_nothing(place: int, positions: list[int]) -> None:
    books, slots = entered()
    pins = slots.pins.copy()
    with pytest.raises(IntegrityError, match=f"place {place} with"):
        books.enter(place, np.arange(1, 11, dtype=np.int32), [ids(*positions)], sink=1, recent=2)
    assert (slots.pins == pins).all()
    books.check_integrity()
    assert books.settle().recalls == []


def test_a_list_is_applied_once_and_only_for_the_tenant_it_was_made_for() -> None:
    books, slots = entered()
    applied(books, 3, listed([4], [3]))
    for step in (3, 2):
        with pytest.raises(IntegrityError, match=f"the list of step {step} comes after that of step 3"):
            books.apply(step, listed([6], [5]))
    books.leave(1)
    assert not slots.pins.any()
    assert applied(books, 4, listed([6], [5])) == []
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
    books.settle()
    both = np.concatenate((listed([4], [3]), listed([4], [3], place=2)))
    (copies,) = applied(books, 0, both)
    assert copies.blocks.tolist() == [5]
    assert slots.pins[0, slots.lut[0, 5]] == 2
    assert slots.pins[0, slots.lut[0, 4]] == 0
    books.leave(1)
    books.check_integrity()
    assert slots.pins[0, slots.lut[0, 5]] == 1


def test_no_change_of_a_step_needs_the_slots_that_another_one_gives_up() -> None:
    books, slots = entered(num_slots=7)
    # Of six slots one is left: for a block that is begun, and one that comes, two go
    books.append(ids(1), ids(10), ids(30), ids(2))
    books.apply(0, listed([6], [3, 5]))
    taken = books.settle()
    assert (taken.fresh[0].blocks.tolist(), taken.prefetches[0].blocks.tolist()) == ([30], [7])
    assert sorted(table(books)) == [0, 6, 8, 9, 10]
    books.check_integrity()
    assert (books.pins() == slots.pins).all()


def test_a_block_that_goes_from_one_request_and_comes_to_another_is_not_copied() -> None:
    books, _ = entered(num_slots=9)
    books.enter(2, np.arange(1, 11, dtype=np.int32), [ids(0, 4, 6, 8, 9)], sink=1, recent=2)
    books.settle()
    both = np.concatenate((listed([6], [3]), listed([3], [6], place=2)))
    assert applied(books, 0, both) == []
    assert sorted(table(books)) == [0, 5, 6, 8, 9]
    books.check_integrity()


def test_what_is_read_beside_a_set_is_exchanged_with_it_and_given_up_in_one_go() -> None:
    books, slots = entered()
    books.widen(1, [ids(1, 2, 4)])
    assert books.settle().prefetches[0].blocks.tolist() == [2, 3, 5]
    assert (table(books), books.groups[0].set_of(1).tolist()) == ([0, 3, 5, 1, 2, 4, 8, 9], [3, 5])
    # 4 is there already, 6 is not; both that go are still read
    assert applied(books, 0, listed([4, 6], [3, 5]))[0].blocks.tolist() == [7]
    assert sorted(table(books)) == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert sorted(books.groups[0].set_of(1).tolist()) == [4, 6]
    books.check_integrity()
    with pytest.raises(IntegrityError, match=r"blocks \[3\] go,"):
        books.apply(1, listed([], [3]))
    books.narrow(1)
    assert sorted(table(books)) == [0, 4, 6, 8, 9]
    books.check_integrity()
    assert (books.pins() == slots.pins).all()


def test_some_rows_of_a_list_may_come_before_the_others() -> None:
    books, _ = entered()
    books.apply(3, listed([4], [3]), at_once=True)
    assert books.settle().recalls[0].blocks.tolist() == [5]
    assert applied(books, 3, listed([6], [5]))[0].blocks.tolist() == [7]


def test_after_all_is_forgotten_lists_of_before_are_for_nobody() -> None:
    books, slots = entered()
    books.append(ids(1), ids(10), ids(30), ids(2))
    slots.clear()
    books.clear()
    books.check_integrity()
    taken = books.settle()
    assert (taken.fresh, taken.recalls, books.groups[0].take_edits().size) == ([], [], 0)
    assert applied(books, 0, listed([4], [3])) == []
