"""Scores come into force after a fixed number of steps, the first at once, and never for a request that is gone."""

import numpy as np
import torch

from flashmemory_vllm.indexer.base import IndexGeometry, ScoringRequest, Selector
from flashmemory_vllm.residency.types import DueSelection
from flashmemory_vllm.runtime.selection import SelectionQueue
from flashmemory_vllm.runtime.side_stream import SideStream

CPU = torch.device("cpu")
GEOMETRY = IndexGeometry(8, 4, 2, 1, 4, 1.0, (0,), (0,), 1, torch.float32, CPU)


class QuerySum(Selector):
    """Scores every block by the sum of the queries and records what it was asked."""

    name = "query_sum"
    needs_queries = True
    needs_keys = False

    def __init__(self) -> None:
        super().__init__(GEOMETRY)
        self.requests: list[ScoringRequest] = []
        self.forgotten: list[str] = []

    def score(self, request: ScoringRequest) -> torch.Tensor:
        assert request.queries is not None
        self.requests.append(request)
        return request.queries.sum().expand(1, len(request.block_ids)).clone()

    def forget(self, req_id: str) -> None:
        self.forgotten.append(req_id)


def due(req_id: str = "a", *, first: bool, at_once: bool = False) -> DueSelection:
    return DueSelection(req_id, 13, 3, first, first or at_once, np.array([5, 2, 6], dtype=np.int32))


def make_queue(delay: int) -> tuple[SelectionQueue, QuerySum]:
    selector = QuerySum()
    return SelectionQueue(selector, delay, SideStream(CPU)), selector


def test_the_first_selection_is_ready_for_the_next_step_and_later_ones_are_delayed() -> None:
    queue, _ = make_queue(delay=2)
    queue.score(10, due(first=True), torch.ones(1, 2, 4), None)
    assert [selection.req_id for selection in queue.deliver(11)] == ["a"]
    queue.score(20, due(first=False), torch.ones(1, 2, 4), np.ones((1, 3), np.bool_))
    assert [len(queue.deliver(step)) for step in (21, 22, 23, 24)] == [0, 0, 1, 0]
    queue.score(30, due(first=False, at_once=True), torch.ones(1, 2, 4), np.ones((1, 3), np.bool_))
    assert len(queue.deliver(31)) == 1


def test_queries_may_be_overwritten_after_scoring_was_asked_for() -> None:
    queue, selector = make_queue(delay=0)
    queries = torch.ones(1, 2, 4)
    queue.score(1, due(first=True), queries, None)
    queries.fill_(99)
    (selection,) = queue.deliver(2)
    assert selection.scores is not None
    assert selection.scores.tolist() == [[8.0, 8.0, 8.0]]
    assert selector.requests[0].queries is not None
    assert selector.requests[0].queries.sum() == 8
    assert selector.requests[0].block_ids.tolist() == [5, 2, 6]
    assert selector.requests[0].prompt_len == 13


def test_selections_of_a_request_are_counted_until_it_is_gone() -> None:
    queue, selector = make_queue(delay=1)
    for step in (1, 2):
        queue.score(step, due(first=step == 1), torch.ones(1, 2, 4), None)
    queue.forget(["a"])
    assert queue.deliver(9) == []
    queue.score(10, due(first=True), torch.ones(1, 2, 4), None)
    assert [request.step_index for request in selector.requests] == [0, 1, 0]


def test_queries_of_earlier_tokens_reach_the_selector() -> None:
    queue, selector = make_queue(delay=0)
    earlier = torch.ones(3, 1, 2, 4)
    queue.score(1, due(first=True), torch.ones(1, 2, 4), None, earlier)
    queue.score(2, due(first=False), torch.ones(1, 2, 4), np.ones((1, 3), np.bool_))
    assert selector.requests[0].earlier is earlier
    assert selector.requests[1].earlier is None


def test_a_preemption_drops_what_is_under_way_but_not_what_is_known() -> None:
    queue, selector = make_queue(delay=1)
    for step in (1, 2):
        queue.score(step, due(first=step == 1), torch.ones(1, 2, 4), None)
    queue.preempt(["a", "never heard of"])
    assert queue.deliver(9) == []
    assert selector.forgotten == []
    queue.score(10, due(first=True), torch.ones(1, 2, 4), None)
    assert [request.step_index for request in selector.requests] == [0, 1, 2]
    queue.forget(["a"])
    assert selector.forgotten == ["a"]
