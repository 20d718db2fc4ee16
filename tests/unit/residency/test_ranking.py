"""The best blocks, and of equal ones the last."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flashmemory_vllm.residency.ranking import best

WORTH = st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0, np.inf]), max_size=20)


@given(WORTH, st.integers(-1, 22))
def test_the_best_are_the_last_of_all_in_their_order(drawn: list[float], count: int) -> None:
    in_order = sorted(range(len(drawn)), key=lambda at: (drawn[at], at))
    kept = min(max(count, 0), len(drawn))
    assert np.flatnonzero(best(np.array(drawn, np.float32), count)).tolist() == sorted(in_order[len(drawn) - kept :])
