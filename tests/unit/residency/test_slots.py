"""The slot table: content states, pins, and the order of eviction."""

import numpy as np
import pytest

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import Geometry, IntArray


def ids(*blocks: int) -> IntArray:
    return np.array(blocks, np.int32)


def make_table(num_slots: int = 5, num_groups: int = 1) -> SlotTable:
    table = SlotTable(Geometry(num_logical_blocks=20, num_slots=num_slots, num_groups=num_groups, block_size=4))
    table.begin_step()
    return table


def make_clean(table: SlotTable, blocks: IntArray) -> None:
    """Write, write back and unpin: cached, used at the current time."""
    for group in range(table.lut.shape[0]):
        table.hold_fresh(group, blocks)
    table.mark_written_back(blocks)
    for group in range(table.lut.shape[0]):
        table.unpin(group, blocks)


def test_null_block_maps_to_null_slot_and_stays_so() -> None:
    table = make_table()
    make_clean(table, ids(1, 2, 3, 4))
    assert table.lut[0, 0] == 0
    assert sorted(table.lut[0, 1:5]) == [1, 2, 3, 4]
    table.check_integrity()


def test_least_recently_used_goes_first() -> None:
    table = make_table()
    for block in (3, 1, 4, 2):
        make_clean(table, ids(block))
        table.begin_step()
    table.touch(0, ids(3))
    make_clean(table, ids(5, 6))
    assert [block for block in range(1, 7) if table.lut[0, block] > 0] == [2, 3, 5, 6]
    assert table.num_evictions == 2
    table.check_integrity()


def test_a_claim_counts_as_use_until_it_is_given_up() -> None:
    table = make_table()
    make_clean(table, ids(1, 2))
    table.pin(0, ids(1))
    table.begin_step()
    make_clean(table, ids(3, 4))
    table.begin_step()
    table.unpin(0, ids(1))
    table.hold_fresh(0, ids(5, 6, 7))
    assert (table.lut[0, 1:5] > 0).tolist() == [True, False, False, False]
    table.check_integrity()


def test_touched_blocks_go_last_and_in_order() -> None:
    table = make_table()
    make_clean(table, ids(1, 2, 3, 4))
    table.touch(0, ids(2, 4, 1))
    table.hold_fresh(0, ids(5, 6, 7))
    assert table.lut[0, 1] > 0
    assert (table.lut[0, 2:5] == -1).all()


def test_pinned_blocks_are_never_evicted() -> None:
    table = make_table()
    make_clean(table, ids(1, 2, 3, 4))
    table.pin(0, ids(1, 2))
    table.pin(0, ids(2))
    table.unpin(0, ids(1, 2))
    table.hold(0, ids(2))
    table.hold_fresh(0, ids(5, 6, 7))
    with pytest.raises(IntegrityError, match=r"1 slots are needed, but of 4 slots 4 are pinned and 0 spare"):
        table.hold_fresh(0, ids(8))
    assert table.lut[0, 2] > 0


def test_making_room_for_some_blocks_keeps_the_others() -> None:
    table = make_table()
    make_clean(table, ids(9, 10))
    table.begin_step()
    make_clean(table, ids(1, 2, 3, 4))
    # Those that have been of no use for longest are asked for
    table.touch(0, ids(3, 4))
    copies = table.hold(0, ids(1, 2, 9))
    assert copies.blocks.tolist() == [9]
    assert (table.lut[0, ids(1, 2, 9)] > 0).all()
    assert table.pins[0, table.lut[0, ids(1, 2, 9)]].tolist() == [1, 1, 1]
    table.check_integrity()


def test_groups_evict_on_their_own() -> None:
    table = make_table(num_groups=2)
    make_clean(table, ids(1, 2, 3, 4))
    table.begin_step()
    table.touch(0, ids(1, 2))
    table.touch(1, ids(3, 4))
    make_clean(table, ids(5, 6))
    assert table.lut[0, 1] > 0
    assert table.lut[1, 1] == -1
    assert table.spare(0) == table.spare(1) == 4
    table.check_integrity()


def test_copies_say_how_long_their_slots_have_rested() -> None:
    table = make_table()
    assert table.hold_fresh(0, ids(1, 2, 3, 4)).rested == 0
    table.mark_written_back(ids(1, 2, 3, 4))
    table.begin_step()  # 2: the step before has read them all
    table.unpin(0, ids(1, 2))
    table.begin_step()  # 3
    table.touch(0, ids(2))
    table.begin_step()  # 4: block 1 was read in step 1, block 2 in step 3
    table.unpin(0, ids(3))
    table.drop(ids(4 + 5))
    table.mark_written_back(ids(9))
    assert table.hold(0, ids(9)).rested == 2
    table.mark_written_back(ids(8))
    assert table.hold(0, ids(8)).rested == 0
    assert (table.lut[0, 1:5] > 0).tolist() == [False, False, True, True]
    table.check_integrity()


def test_after_a_reset_every_slot_counts_as_just_read() -> None:
    table = make_table()
    for _ in range(5):
        table.begin_step()
    table.clear()
    table.mark_written_back(ids(1))
    table.begin_step()
    assert table.hold(0, ids(1)).rested == 0


def test_reallocated_blocks_lose_content_and_slots() -> None:
    table = make_table(num_groups=2)
    make_clean(table, ids(1, 2))
    with pytest.raises(IntegrityError, match="hold other content"):
        table.hold_fresh(0, ids(1))
    table.drop(ids(1, 7))
    assert table.used(0) == table.used(1) == 1
    with pytest.raises(IntegrityError, match="neither a slot nor a valid host copy"):
        table.hold(0, ids(1))
    table.pin(1, ids(2))
    with pytest.raises(IntegrityError, match="in the resident set of a known request"):
        table.drop(ids(2))


def test_demand_counts_what_hold_would_take() -> None:
    table = make_table()
    make_clean(table, ids(1, 2, 3))
    table.pin(0, ids(1))
    assert table.spare(0) == 3
    assert table.demand(0, ids(1, 2, 9)) == 2


def test_giving_up_a_claim_that_does_not_exist() -> None:
    table = make_table()
    make_clean(table, ids(1))
    with pytest.raises(IntegrityError, match="no pin to give up"):
        table.unpin(0, ids(1))
    with pytest.raises(IntegrityError, match="have no slot"):
        table.pin(0, ids(2))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda table: table.lut.__setitem__((0, 1), -1), "each other's inverse"),
        (lambda table: table.lut.__setitem__((0, 9), 2), "each other's inverse"),
        (lambda table: table.host_valid.__setitem__(1, False), "not pinned"),
        (lambda table: table.pins.__setitem__((0, 4), 1), "without a block is pinned"),
        (lambda table: table.lut.__setitem__((0, 0), 3), "null slot"),
    ],
)
def test_damage_is_found(damage: object, message: str) -> None:
    table = make_table()
    make_clean(table, ids(1, 2))
    table.check_integrity()
    assert callable(damage)
    damage(table)
    with pytest.raises(IntegrityError, match=message):
        table.check_integrity()


def test_a_block_without_host_copy_must_be_in_every_group() -> None:
    table = make_table(num_groups=2)
    table.hold_fresh(0, ids(1))
    with pytest.raises(IntegrityError, match="some but not all groups"):
        table.check_integrity()
