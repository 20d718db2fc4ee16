"""A step's choice is asked for in the quick way as `ChoiceQueue` describes it, compiled or not."""

from __future__ import annotations

import numpy as np
import pytest
from flashmemory_kernels.common.due_rows import Due

from flashmemory_vllm.indexer.exact import ExactSelector
from flashmemory_vllm.residency.asked import Ask, Asked
from flashmemory_vllm.residency.quick.compiled import IS_COMPILED, plain
from flashmemory_vllm.runtime import choice_loops
from flashmemory_vllm.runtime.choice_work import ChoiceWork
from flashmemory_vllm.runtime.choices import ChoiceQueue
from flashmemory_vllm.runtime.uploads import UploadRing
from tests.unit.runtime.choosing import PLACES, WIDTH, World

needs_numba = pytest.mark.skipif(not IS_COMPILED, reason="numba is not there")


@pytest.fixture(params=["plain", pytest.param("compiled", marks=needs_numba)], autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(choice_loops, "prepare", plain(choice_loops.prepare))


def drawn(numbers: np.random.Generator, num_tokens: np.ndarray) -> Asked:
    """Some rows that have a set; all have a few tokens more than before."""
    num_tokens += numbers.integers(1, 5, num_tokens.size)
    place = numbers.permutation(PLACES)[: numbers.integers(1, PLACES + 1)].astype(np.int32)
    fields = numbers.integers(0, 50, (place.size, len(Ask))).astype(np.int32)
    fields[:, Ask.PLACE], fields[:, Ask.NUM_TOKENS] = place, num_tokens[place]
    fields[:, Ask.NUM_FULL] = num_tokens[place] // 2
    fields[:, Ask.IS_NEW] = fields[:, Ask.AT_ONCE] = 0
    fields[:, Ask.IS_SCORED] = numbers.random(place.size) < 0.6
    return Asked(tuple(f"r{one}" for one in place), fields, np.zeros((PLACES, WIDTH), np.int32))


def account(queue: ChoiceQueue) -> list[list[int]]:
    return [one.tolist() for one in (queue._remembered_at, queue._known, queue._selections.counts)]


@pytest.mark.parametrize("num_queries", [0, 1])
@pytest.mark.parametrize("is_finite", [True, False])
def test_both_ways_ask_for_the_same(num_queries: int, is_finite: bool) -> None:
    queues = [World(lambda geometry: ExactSelector(geometry, memory_decay=0.9)).queue for _ in range(2)]
    for queue in queues:
        queue._kind, queue._is_finite = queue._kind._replace(num_queries=num_queries), is_finite
    slow, other = queues
    quick, numbers = other._make_quick(), np.random.default_rng(0)
    num_tokens, device = np.full(PLACES, 20), slow._state.known.device
    ring = UploadRing(1000, device)
    for step in range(1, 60):
        asked = drawn(numbers, num_tokens)
        one, two = slow._work(step, slow._in_order(asked), {}), quick.work(step, asked)
        assert two is not None
        told = [[tensor.tolist() for tensor in work.upload(ring)] for work in (one, two)]
        assert told[0] == told[1]
        assert (one.asked.fields == two.asked.fields).all()
        assert one.asked.req_ids == two.asked.req_ids
        for name in ("selections", "fields"):
            assert (getattr(one, name) == getattr(two, name)).all()
        assert (one.scored, one.long_size, one.num_new) == (two.scored, two.long_size, two.num_new)
        assert account(slow) == account(other)


def test_rows_without_a_set_are_left_to_others() -> None:
    queue = World(ExactSelector).queue
    quick, asked = queue._make_quick(), drawn(np.random.default_rng(1), np.full(PLACES, 20))
    before = account(queue)
    for column in (Ask.IS_NEW, Ask.AT_ONCE):
        asked.fields[-1, (Ask.IS_NEW, Ask.AT_ONCE)] = 0
        asked.fields[-1, column] = 1
        assert quick.work(1, asked) is None
        assert account(queue) == before


def test_a_loop_knows_the_columns() -> None:
    """They are told again there, for code on disk does not follow other files."""
    for ask in Ask:
        assert getattr(choice_loops, f"ASK_{ask.name}", ask) == ask
    for due in Due:
        assert getattr(choice_loops, due.name, due) == due
    assert len(Due) == choice_loops.NUM_FIELDS
    names = [due.name for due in list(Due)[Due.SINK_END : Due.LONG_START]]
    assert [Ask[name] for name in names] == list(Ask)[Ask.SINK_END : Ask.CAP + 1]


def test_what_is_complete_is_uploaded_as_it_is() -> None:
    packed = np.arange(18, dtype=np.int32)
    asked = Asked(("a",), np.zeros((1, len(Ask)), np.int32), np.zeros((1, 1), np.int32))
    work = ChoiceWork(asked, packed[:16].reshape(1, 16), packed[16:17], (), 0, (slice(0, 0), slice(0, 1)), packed)
    rows, told = work.upload(UploadRing(18, World(ExactSelector).state.known.device))
    assert (rows.tolist(), told.tolist()) == ([[*range(16)]], [[16], [17]])
