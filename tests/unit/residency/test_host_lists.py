"""Lists made on the host are those that the device makes of the same memory."""

from __future__ import annotations

from random import Random

import numpy as np
import torch
from flashmemory_kernels.choose_sets import ChoicePolicy, choose_sets
from flashmemory_kernels.common.due_rows import Due, make_rows
from hypothesis import given
from hypothesis import strategies as st

from flashmemory_vllm.residency.books import Books
from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.residency.host_lists import Ask, HostLists
from flashmemory_vllm.residency.lists import HEADER, pairs_of
from flashmemory_vllm.residency.ranking import Frame
from flashmemory_vllm.residency.requests import RequestState
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import Geometry, IntArray, NewRequest
from flashmemory_vllm.residency.worth import Worth

WIDTH, NUM_GROUPS, NUM_PLACES = 20, 2, 3
POLICY = BudgetPolicy(1, 0.5, 0, 1, 1, 8, WIDTH, 0)


class Asked:
    """Rows of random lengths and sets, with few different scores, as both sides know them."""

    def __init__(self, random: Random, policy: ChoicePolicy) -> None:
        geometry = Geometry(100, 99, NUM_GROUPS, 1)
        slots = SlotTable(geometry)
        slots.begin_step()
        slots.mark_written_back(np.arange(1, 100, dtype=np.int32))
        self.books = Books(geometry, slots, NUM_PLACES, WIDTH)
        self.lists = HostLists(self.books, policy.threshold, Worth(0.0, policy.successor, policy.hysteresis))
        self.memory = np.full((1, NUM_GROUPS, NUM_PLACES, WIDTH), np.nan, np.float32)
        self.in_set = np.zeros((NUM_GROUPS, NUM_PLACES, WIDTH), np.int8)
        self.asks: list[Ask] = []
        self.fields: list[dict[Due, int]] = []
        for place in range(NUM_PLACES):
            self._add(random, place)

    def _add(self, random: Random, place: int) -> None:
        end = random.randint(4, WIDTH)
        frame = Frame(1, end - random.randint(1, 2), end)
        candidates = range(frame.sink_end, frame.recent_start)
        num_known, is_new = random.randint(0, end), random.random() < 0.3
        want, cap = random.randint(0, len(candidates)), random.choice([0, 1, 2, WIDTH])
        if not is_new:
            far = [sorted(random.sample(candidates, random.randint(0, len(candidates)))) for _ in range(NUM_GROUPS)]
            chosen = [np.array([0, *one, *range(frame.recent_start, end)], np.int32) for one in far]
            ids = np.arange(1 + 25 * place, 1 + 25 * place + end, dtype=np.int32)
            self.books.enter(place, ids, chosen, sink=1, recent=end - frame.recent_start)
            for group, positions in enumerate(chosen):
                self.in_set[group, place, positions] = 1
        state = RequestState.begin(NewRequest("", (), 0, end), POLICY, NUM_GROUPS, place)
        state.num_tokens = end
        scores = np.array([[random.choice([0, 0.25, 0.5, 1.0]) for _ in range(num_known)] for _ in range(NUM_GROUPS)])
        self.memory[0, :, place, :num_known] = scores.reshape(NUM_GROUPS, num_known)
        self.lists.remember(state, scores.reshape(NUM_GROUPS, num_known).astype(np.float32))
        self.asks.append(Ask(place, frame, want, cap, is_new))
        self.fields.append({
            Due.PLACE: place, Due.STEP: 7, Due.IS_NEW: is_new, Due.NUM_BLOCKS: num_known,
            Due.SINK_END: frame.sink_end, Due.FIRST_RECENT: frame.recent_start, Due.END: end,
            Due.WANT: want, Due.CAP: cap, Due.LONG_START: -1,
        })  # fmt: skip

    def by_device(self, policy: ChoicePolicy) -> IntArray:
        """The device's list, with room for everything."""
        listed = torch.full((NUM_PLACES, NUM_GROUPS, HEADER + 2 * WIDTH), -1, dtype=torch.int32)
        rows, long_list = make_rows(self.fields, NUM_PLACES, WIDTH), torch.zeros(0, dtype=torch.int32)
        memory, in_set = torch.from_numpy(self.memory), torch.from_numpy(self.in_set)
        choose_sets(memory, in_set, rows, torch.ones(1), policy, listed, long_list)
        return listed.numpy()


@given(
    seed=st.integers(0, 2**32),
    successor=st.sampled_from([0.0, 0.5]),
    hysteresis=st.sampled_from([0.0, 1.0]),
    threshold=st.sampled_from([0.0, 0.5]),
)
def test_both_sides_list_the_same(seed: int, successor: float, hysteresis: float, threshold: float) -> None:
    policy = ChoicePolicy("sum", successor, hysteresis, threshold)
    asked = Asked(Random(seed), policy)
    mine, theirs = asked.lists.make(7, asked.asks), asked.by_device(policy)
    for group in range(NUM_GROUPS):
        assert mine[:, group, :HEADER].tolist() == theirs[:, group, :HEADER].tolist()
        assert [side.tolist() for side in pairs_of(mine[:, group])] == [
            side.tolist() for side in pairs_of(theirs[:, group])
        ]


def test_what_a_list_left_out_is_due_until_one_has_it() -> None:
    books = Books(Geometry(30, 30, 1, 1), SlotTable(Geometry(30, 30, 1, 1)), 2, WIDTH)
    lists, state = HostLists(books, 0.0, Worth()), RequestState.begin(NewRequest("a", (), 0, 10), POLICY, 1, 1)
    state.num_tokens = 10
    assert not lists.is_due(1)
    lists.remember(state, np.arange(10, dtype=np.float32)[None])
    due = []
    for cap in (0, 2, 3):
        listed = lists.make(0, [Ask(1, Frame(1, 9, 10), 3, cap, is_new=True)])
        due.append((pairs_of(listed[:, 0]).come.tolist(), lists.is_due(1)))
    assert due == [([], True), ([7, 8], True), ([6, 7, 8], False)]
    # They are those of the tenant, not of the place
    lists.remember(state, np.arange(10, dtype=np.float32)[None])
    books.leave(1)
    assert not lists.is_due(1)
    assert pairs_of(lists.make(0, [Ask(1, Frame(1, 9, 10), 1, 1, is_new=True)])[:, 0]).come.tolist() == [8]
