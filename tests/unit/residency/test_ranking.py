"""Ranks: by score, and whatever is newer than the scoring above all, the newest first."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flashmemory_vllm.residency.ranking import best, worst_to_best
from flashmemory_vllm.residency.types import FloatArray, IntArray


@st.composite
def ranked(draw: st.DrawFn) -> tuple[IntArray, FloatArray]:
    """Positions, and scores of the first ones, all different."""
    positions = sorted(draw(st.sets(st.integers(0, 40), min_size=1)))
    scores = draw(st.permutations(range(draw(st.integers(0, 41)))))
    return np.array(positions, np.int32), np.array(scores, np.float32)


@given(ranked(), st.integers(-1, 45))
def test_the_best_are_the_last_of_all_in_their_order(drawn: tuple[IntArray, FloatArray], count: int) -> None:
    positions, scores = drawn
    ranks = {int(one): (one >= len(scores), one if one >= len(scores) else scores[one]) for one in positions}
    in_order = sorted(ranks, key=lambda one: ranks[one])
    assert worst_to_best(positions, scores).tolist() == in_order
    kept = min(max(count, 0), len(in_order))
    assert best(positions, scores, count).tolist() == sorted(in_order[len(in_order) - kept :])
