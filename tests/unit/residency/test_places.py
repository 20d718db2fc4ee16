"""Each request has a place of its own, from when it is asked for to when it is left."""

import pytest

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.places import Places


def test_a_place_stays_and_is_nobody_elses() -> None:
    places = Places(3)
    taken = {name: places.of(name) for name in "abc"}
    assert sorted(taken.values()) == [0, 1, 2]
    assert {name: places.of(name) for name in "cab"} == taken


def test_places_that_were_left_are_given_out_again() -> None:
    places = Places(2)
    first = places.of("a"), places.of("b")
    places.leave(["a", "never heard of", "a"])
    assert len(places) == 1
    assert (places.of("c"), places.of("b")) == first
    places.clear()
    assert sorted((places.of("d"), places.of("e"))) == [0, 1]


def test_more_requests_than_run_at_once_are_refused() -> None:
    places = Places(1)
    places.of("a")
    with pytest.raises(IntegrityError, match="request b: 1 others have blocks, no more run at once by --max-num-seqs"):
        places.of("b")
