"""Makes lists as the device does, by worths that a test names; what a step asks for is in force in the next one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from flashmemory_kernels.choose_sets import ChoicePolicy, choose_sets
from flashmemory_kernels.common.due_rows import Due, make_rows

from flashmemory_vllm.residency.asked import Asked, AskedRow
from flashmemory_vllm.residency.budget import STEPS_TO_FORCE, cdiv
from flashmemory_vllm.residency.lists import HEADER, NOBODY, Chosen, pairs_of
from flashmemory_vllm.residency.plan import StepPlan
from flashmemory_vllm.residency.planner import StepPlanner
from flashmemory_vllm.residency.requests import ScheduledRequest
from flashmemory_vllm.residency.types import FloatArray


class ListTwin:
    """Stands for the device beside a planner. A request that nobody names a worth for keeps its newest blocks.

    Args:
        planner: whose steps ask.
        policy: how worth is made of what is named.
    """

    def __init__(self, planner: StepPlanner, policy: ChoicePolicy) -> None:
        books = planner._books
        size = (len(books.groups), *books.ids.shape)
        self._planner, self._policy = planner, policy
        self._memory, self.in_set = torch.zeros(1, *size), torch.zeros(size, dtype=torch.int8)
        self._known = np.zeros(len(books.ids), np.int32)
        self._offered: dict[str, FloatArray] = {}
        self._asked: list[AskedRow] = []
        self._step = 0

    def offer(self, req_id: str, worth: FloatArray) -> None:
        """Name worths, 0 or more, float32 `[G, n]` of the first blocks; a list is made of them for the next step."""
        self._offered[req_id] = worth

    def note(self, plan: StepPlan) -> None:
        """A step has been planned."""
        self._step, self._asked = plan.step, [*plan.asked]

    def take(self) -> list[Chosen]:
        """What comes into force in the step that begins."""
        asked = {one.req_id: one for one in self._asked}
        for req_id in asked.keys() - self._offered.keys():
            asked[req_id] = asked[req_id]._replace(is_scored=False)
        for req_id in self._offered:
            state = self._planner.requests.get(req_id)
            if state is None or state.num_tokens < state.prefill_len:
                continue
            row = ScheduledRequest(state, state.num_tokens - 1, 1, state.policy.block_size)
            if req_id not in asked or not asked[req_id].is_scored:
                is_new = not state.is_decoding
                asked[req_id] = self._asked_row(row, state.num_tokens + is_new, is_new=is_new)
        num_fetching = max(1, sum(one.cap > 0 and not one.at_once for one in asked.values()))
        share = max(1, self._planner._asking._max_fetches // num_fetching)
        rows = [one._replace(cap=min(one.cap, share)) if not one.at_once else one for one in asked.values()]
        self._asked = []
        parts = ([one for one in rows if one.at_once], [one for one in rows if not one.at_once])
        chosen = [self.choose(self._step, part) for part in parts if part]
        self.forget_offers()
        return chosen

    def forget_offers(self) -> None:
        """Nothing is named any more."""
        self._offered = {}

    def choose(self, step: int, asked: Sequence[AskedRow]) -> Chosen:
        """The list of a step for rows that are all in force at once, or none."""
        fields = [self._fields(step, one) for one in asked]
        width = self.in_set.shape[2]
        listed = torch.full((len(asked), len(self.in_set), HEADER + 2 * width), NOBODY, dtype=torch.int32)
        rows, nothing = make_rows(fields, len(asked), tile=width), torch.zeros(0, dtype=torch.int32)
        choose_sets(self._memory, self.in_set, rows, torch.ones(1), self._policy, listed, nothing)
        is_selected = np.array([one.req_id in self._offered for one in asked])
        return Chosen(
            step, Asked.of(asked, self._planner._books.ids), listed.numpy(), is_selected, asked[0].at_once, 0.25
        )

    def _asked_row(self, row: ScheduledRequest, num_tokens: int, *, is_new: bool) -> AskedRow:
        """What a step that scores asks for a row that has so many tokens, by the policy alone."""
        state, policy = row.state, row.state.policy
        end = cdiv(num_tokens, row.block_size)
        first_recent = max(0, end - policy.recent_blocks(num_tokens))
        sink_end = min(policy.sink_blocks(num_tokens), first_recent)
        return AskedRow(
            state.req_id, state.place, int(self._planner._books.epoch[state.place]), row.num_tokens_after,
            state.prompt_len, row.num_tokens_after // row.block_size, sink_end, first_recent, end,
            want=policy.decode_budget(num_tokens) - sink_end - (end - first_recent), cap=end,
            is_new=is_new, at_once=is_new,
        )  # fmt: skip

    def _fields(self, step: int, asked: AskedRow) -> dict[Due, int]:
        """As the device reads them."""
        worth = self._offered.get(asked.req_id)
        if asked.is_new:
            self._known[asked.place] = 0
        if worth is not None:
            self._known[asked.place] = worth.shape[1]
            self._memory[0, :, asked.place, : worth.shape[1]] = torch.from_numpy(worth)
        return {
            Due.PLACE: asked.place, Due.EPOCH: asked.epoch, Due.STEP: step, Due.IS_NEW: asked.is_new,
            Due.NUM_BLOCKS: int(self._known[asked.place]), Due.SINK_END: asked.sink_end,
            Due.FIRST_RECENT: asked.first_recent, Due.END: asked.end, Due.WANT: asked.want,
            Due.CAP: asked.end if asked.at_once else asked.cap, Due.LONG_START: NOBODY,
        }  # fmt: skip


class LateLists:
    """Lists as late as on a device: chosen at the end of a step, and all but those at once in force two steps later.

    Args:
        planner: whose steps ask.
        policy: how worth is made of what is drawn.
        seed: of the draws.
    """

    def __init__(self, planner: StepPlanner, policy: ChoicePolicy, seed: int) -> None:
        self._planner, self._twin = planner, ListTwin(planner, policy)
        self._numbers = np.random.default_rng(seed)
        self._pending: list[tuple[int, Chosen]] = []

    def note(self, plan: StepPlan) -> None:
        """Choose for the rows of a step; now and then the selector fails for one."""
        for asked in plan.asked:
            if asked.is_scored and self._numbers.random() < 0.95:
                size = (len(self._twin.in_set), asked.num_full)
                self._twin.offer(asked.req_id, self._numbers.integers(0, 6, size).astype(np.float32))
        for at_once in (True, False):
            part = [asked for asked in plan.asked if asked.at_once == at_once]
            if part:
                self._pending.append(
                    (plan.step + (1 if at_once else STEPS_TO_FORCE), self._twin.choose(plan.step, part))
                )
        self._twin.forget_offers()

    def take(self, step: int) -> list[Chosen]:
        """What comes into force in a step."""
        due = [chosen for when, chosen in self._pending if when <= step]
        self._pending = [(when, chosen) for when, chosen in self._pending if when > step]
        return sorted(due, key=lambda chosen: chosen.step)

    def check(self) -> None:
        """What the books hold becomes what was chosen, once all lists are in force."""
        for place, epoch, sets in self._planner.sets():
            for group, positions in enumerate(sets):
                held = set(positions.tolist())
                for _, chosen in self._pending:
                    _, come, go = pairs_of(chosen.rows[(chosen.rows[:, 0, :2] == (place, epoch)).all(1), group])
                    held = (held - set(go.tolist())) | set(come[come != NOBODY].tolist())
                assert sorted(held) == torch.nonzero(self._twin.in_set[group, place])[:, 0].tolist()
