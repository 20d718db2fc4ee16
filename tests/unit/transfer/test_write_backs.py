"""PendingWriteBacks against a list that remembers everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flashmemory_vllm.transfer.engine import Ids
from flashmemory_vllm.transfer.write_backs import PendingWriteBacks

NUM_GROUPS, NUM_BLOCKS, NUM_SLOTS = 2, 6, 4


@dataclass(eq=False)
class Landing:
    """A marker that comes true when the test says so."""

    group: int
    blocks: Ids
    slots: Ids
    is_done: bool = False

    def query(self) -> bool:
        return self.is_done

    def wait(self, stream: Any = None) -> None:
        del stream
        raise AssertionError("asking must not wait")

    def synchronize(self) -> None:
        raise AssertionError("asking must not wait")


def some(limit: int) -> st.SearchStrategy[Ids]:
    return st.lists(st.integers(0, limit - 1), unique=True, max_size=3).map(lambda ids: np.array(ids, np.int32))


WRITE_BACK = st.tuples(st.integers(0, NUM_GROUPS - 1), some(NUM_BLOCKS), some(NUM_SLOTS))


@given(st.lists(st.one_of(WRITE_BACK, st.integers(1, 3)), max_size=30), some(NUM_BLOCKS), some(NUM_SLOTS))
def test_the_newest_pending_one_that_touches_any_is_found(
    history: list[tuple[int, Ids, Ids] | int], blocks: Ids, slots: Ids
) -> None:
    pending = PendingWriteBacks(NUM_GROUPS, NUM_BLOCKS, NUM_SLOTS)
    under_way: list[Landing] = []
    for event in history:
        if isinstance(event, int):
            # A stream works in order: the oldest land first.
            for landing in under_way[:event]:
                landing.is_done = True
            del under_way[:event]
        else:
            group, written, read = event
            count = min(len(written), len(read))
            under_way.append(Landing(group, written[:count], read[:count]))
            pending.add(group, written[:count], read[:count], under_way[-1])
        for group in range(NUM_GROUPS):
            writers = [one for one in under_way if one.group == group and np.isin(blocks, one.blocks).any()]
            readers = [one for one in under_way if one.group == group and np.isin(slots, one.slots).any()]
            assert pending.writing(group, blocks) is (writers[-1] if writers else None)
            assert pending.reading(group, slots) is (readers[-1] if readers else None)
    assert len(pending) == len(under_way)
