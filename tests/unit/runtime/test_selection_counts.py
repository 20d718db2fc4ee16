"""Selections are counted by place, and follow their requests from place to place."""

from collections import Counter
from random import Random

import numpy as np
import pytest

from flashmemory_vllm.runtime.selection_counts import SelectionCounts

NUM_PLACES = 3


@pytest.mark.parametrize("seed", range(30))
def test_counts_are_those_of_a_plain_counter_by_name(seed: int) -> None:
    random, counts, plain = Random(seed), SelectionCounts(NUM_PLACES), Counter[str]()
    at: dict[int, str] = {}
    for _ in range(60):
        names = [f"r{index}" for index in range(6)]
        new = {}
        for place in range(NUM_PLACES):
            if random.random() < 0.3:
                # Whoever had the place has lost it, or ended; a request may come back at another place or the same
                gone = at.pop(place, None)
                if gone is not None and random.random() < 0.4:
                    counts.forget(gone)
                    del plain[gone]
                free = [name for name in names if name not in at.values()]
                new[place] = at[place] = random.choice(free)
        places = [*new, *(place for place in at if place not in new)]
        before = counts.before(np.array(places, np.int32), list(new.values()))
        assert before.tolist() == [plain[at[place]] for place in places]
        chosen = [place for place in places if random.random() < 0.7]
        counts.count(np.array(chosen, np.int32))
        plain.update(at[place] for place in chosen)
        assert all(counts.of(name) == plain[name] for name in names)
    for name in counts.names():
        counts.forget(name)
    assert counts.names() == []
