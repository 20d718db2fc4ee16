"""A set that grows keeps what a choice from all of its blocks would keep."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flashmemory_vllm.residency.ranking import worst_to_best
from flashmemory_vllm.residency.resident_set import ResidentSet
from flashmemory_vllm.residency.types import NOTHING, IntArray


def ids(*positions: int) -> IntArray:
    return np.array(positions, np.int32)


@given(st.data())
def test_growth_does_without_the_worst(data: st.DataObject) -> None:
    end = data.draw(st.integers(2, 20))
    kinds = data.draw(st.lists(st.sampled_from(["held", "waiting", "neither"]), min_size=end, max_size=end))
    held = ids(*(position for position, kind in enumerate(kinds) if kind == "held"))
    waiting = ids(*(position for position, kind in enumerate(kinds) if kind == "waiting"))
    scores = np.array(data.draw(st.lists(st.integers(0, 3), max_size=end)), np.float32)
    start = data.draw(st.integers(0, held.size))
    stop = data.draw(st.integers(start, held.size))
    candidates = np.sort(np.concatenate((held[start:stop], waiting)))
    excess = data.draw(st.integers(-1, candidates.size))
    resident = ResidentSet()
    resident.replace(held, scores, worst_to_best(waiting, scores)[::-1], NOTHING)
    resident.slots = 100 + held[: data.draw(st.integers(0, held.size))]

    dropped = resident.grow(end, end + 2, excess, slice(start, stop), scores)

    given_up = worst_to_best(candidates, scores)[: max(excess, 0)]
    left = np.setdiff1d(held, given_up)
    assert sorted(dropped) == np.intersect1d(held, given_up).tolist()
    assert resident.held.tolist() == [*left, end, end + 1]
    assert sorted(resident.waiting) == np.setdiff1d(waiting, given_up).tolist()
    assert resident.ranks.tolist() == scores[left[left < scores.size]].tolist()
    assert (resident.slots == 100 + resident.held[: resident.slots.size]).all()


def test_waiting_blocks_join_best_first() -> None:
    scores = np.arange(10, dtype=np.float32)
    resident = ResidentSet()
    resident.replace(ids(0, 4), scores, ids(9, 2, 1), ids(5, 6, 7))
    resident.join(2, scores)
    assert resident.held.tolist() == [0, 2, 4, 9]
    assert resident.ranks.tolist() == [0, 2, 4, 9]
    assert ([portion.tolist() for portion in resident.portions], resident.waiting.tolist()) == ([[2, 9]], [1])
    resident.fill_in(ids(5, 6, 7), scores)
    assert resident.leaving.tolist() == [7]
    assert resident.is_changing
    resident.join(1, scores)
    resident.fill_in(ids(7), scores)
    assert resident.leaving.size == 0
    assert not resident.is_changing
