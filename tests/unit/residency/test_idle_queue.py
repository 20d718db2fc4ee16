"""The queue of idle slots is a list in which each slot stands once, at the place where it was put last."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.idle_queue import IdleQueue

NUM_SLOTS = 6
SLOTS = st.lists(st.integers(1, NUM_SLOTS - 1), unique=True)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), SLOTS),
        st.tuples(st.just("remove"), SLOTS),
        st.tuples(st.just("take"), st.integers(0, NUM_SLOTS)),
    ),
    max_size=60,  # long enough for stale entries to be cleared away
)


@given(STEPS)
def test_it_is_a_list_of_distinct_slots(steps: list[tuple[str, object]]) -> None:
    queue, expected = IdleQueue(NUM_SLOTS), list(range(1, NUM_SLOTS))
    for what, given_slots in steps:
        if isinstance(given_slots, int):
            if given_slots > len(expected):
                with pytest.raises(IntegrityError, match=f"{given_slots} idle slots are asked for"):
                    queue.take(given_slots)
                return
            assert queue.take(given_slots).tolist() == expected[:given_slots]
            del expected[:given_slots]
            continue
        assert isinstance(given_slots, list)
        expected = [slot for slot in expected if slot not in given_slots]
        if what == "add":
            queue.add(np.array(given_slots, np.int32))
            expected += given_slots
        else:
            queue.remove(np.array(given_slots, np.int32))
        assert queue.live().tolist() == expected
    queue.fill()
    assert queue.live().tolist() == list(range(1, NUM_SLOTS))
