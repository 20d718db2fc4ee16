"""After the warm-up no choice waits for a compiler, however many rows it is for and however far they have come."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from flashmemory_kernels.choose_sets import ChoicePolicy

from flashmemory_vllm.indexer import create_selector
from flashmemory_vllm.residency.asked import Asked, AskedRow
from flashmemory_vllm.runtime.choice import ChoiceSizes, ChoiceState
from flashmemory_vllm.runtime.choices import ChoiceQueue
from flashmemory_vllm.runtime.queries import QueryRing
from flashmemory_vllm.runtime.shape import AttentionShape
from flashmemory_vllm.runtime.side_stream import SideStream
from tests.unit.runtime.choosing import BLOCK, HKV, HQ, A, D, make_geometry

PLACES, WIDTH, LISTED, QUESTION = 80, 48, 8, 16

POLICIES: dict[str, dict[str, Any]] = {
    "exact": {"memory_decay": 0.9, "question_share": 0.3, "index_dtype": "fp8"},
    "bounds": {},
    "mean": {"aggregate": "mean"},
    "h2o": {},
}


class Rows:
    """Requests at all places, none of which has blocks of its own; some ask in each step."""

    def __init__(self, queue: ChoiceQueue) -> None:
        self.queue, self.rng, self.step = queue, random.Random(0), 10
        self.lengths = [self.rng.randint(20 * BLOCK, 30 * BLOCK) for _ in range(PLACES)]
        self.questions = torch.randn(QUESTION, A, HQ, D, device=queue._state.known.device)

    def ask(self, num_rows: int, *, is_new: bool = False) -> None:
        """One step for some of them, all of which have come a few tokens further."""
        self.step += 1
        for place in range(PLACES):
            self.lengths[place] += self.rng.randint(1, 5)
        rows = []
        for place in self.rng.sample(range(PLACES), num_rows):
            num_tokens = self.lengths[place]
            end = -(-num_tokens // BLOCK)
            blocks = num_tokens // BLOCK, 1, end - 1, end
            rows.append(AskedRow(str(place), place, 1, num_tokens, 20 * BLOCK, *blocks, 4, 2, is_new, True, is_new))
        earlier = {row.req_id: self.questions[: self.rng.choice((4, QUESTION))] for row in rows if is_new}
        self.queue.choose(self.step, Asked.of(rows, self.queue._state.places.block_ids.cpu().numpy()), earlier)
        self.queue.take(self.step)


def make_queue(name: str, device: str) -> ChoiceQueue:
    selector = create_selector(name, make_geometry(device=device), **POLICIES[name])
    kind = selector.memory_kind
    shape = AttentionShape(("0",), HQ, HKV, D, 0.5, BLOCK, torch.float32, selector.geometry.device)
    queries = QueryRing(A, PLACES, 5, shape).by_place
    sizes = ChoiceSizes(len(kind.channels), 1, PLACES, WIDTH, PLACES, LISTED)
    block_ids = torch.zeros(PLACES, WIDTH, dtype=torch.int32, device=device)
    state = ChoiceState(sizes, queries, block_ids, kind, ChoicePolicy(kind.combine))
    return ChoiceQueue(selector, state, SideStream(selector.geometry.device))


@pytest.mark.parametrize("name", POLICIES)
def test_no_choice_waits_for_a_compiler(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    queue = make_queue(name, "cuda")
    queue.warm_up(torch.zeros(QUESTION, A, HQ, D, device="cuda"))
    compiled = list[str]()

    def note(*_: Any, repr: str, **__: Any) -> None:  # noqa: A002 - Triton's name
        compiled.append(repr)

    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", note)
    rows = Rows(queue)
    for num_rows in (1, 2, 16, 17, PLACES):
        rows.ask(num_rows, is_new=True)
    for num_rows in (*range(1, PLACES, 3), 16, 32, 64):
        rows.ask(num_rows)
    torch.cuda.synchronize()
    assert compiled == []
