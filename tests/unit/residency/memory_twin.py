"""A memory that holds tags instead of keys and values, and executes step plans as a worker would.

Every token of every request has a tag that stands for its KV: equal prefixes have equal tags, nothing else
has. What a row reads is compared with the tags it must find, so a wrong slot, a lost write-back, a stale host
copy or a read of a copy that is still under way all show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flashmemory_vllm.residency.budget import BudgetPolicy, cdiv
from flashmemory_vllm.residency.plan import StepPlan
from flashmemory_vllm.residency.planner import StepPlanner
from flashmemory_vllm.residency.types import Copies, Geometry, IntArray, Phase, Row

TagArray = npt.NDArray[np.int64]
GARBAGE = -1
GROUP_STRIDE = 10**12


class TwinRequest(Protocol):
    """What the memory needs to know of a request."""

    block_ids: list[int]

    def tags(self, start: int, end: int) -> TagArray:
        """Tags of the tokens `[start, end)`."""


class MemoryTwin:
    """Device slots and host pool of tags."""

    def __init__(self, geometry: Geometry, policy_of: Callable[[str], BudgetPolicy]) -> None:
        self._geometry = geometry
        self._policy_of = policy_of
        groups, block_size = geometry.num_groups, geometry.block_size
        self._device = np.full((groups, geometry.num_slots, block_size), GARBAGE, np.int64)
        self._host = np.full((geometry.num_logical_blocks, groups, block_size), GARBAGE, np.int64)
        # The newest step that read or wrote a slot
        self._last_use = np.full((groups, geometry.num_slots), -1)
        self._num_steps = 0
        self.num_streamed = 0
        self.num_rested = 0
        self.num_left_out = 0

    def execute(self, plan: StepPlan, planner: StepPlanner, requests: Mapping[str, TwinRequest]) -> None:
        """Run one step and assert that every read finds what it must."""
        for copies in plan.fresh:
            self._device[copies.group, copies.slots] = GARBAGE
        for copies in (*plan.recalls, *plan.prefetches):
            self._load(copies, planner)
        for row in plan.rows.values():
            self._write(row, requests[row.req_id], planner.lut)
        for row in plan.rows.values():
            self._check_row(row, requests[row.req_id], planner)
        self._num_steps += 1
        for group, slots in enumerate(plan.write_backs.slots):
            assert (planner.lut[group, plan.write_backs.blocks] == slots).all()
            self._host[plan.write_backs.blocks, group] = self._device[group, slots]

    def check_host(self, block_id: int, tags: TagArray) -> None:
        """Assert that a full block's host copy is what was written."""
        for group in range(self._geometry.num_groups):
            assert (self._host[block_id, group] == tags + group * GROUP_STRIDE).all(), f"block {block_id} lost"

    def _load(self, copies: Copies, planner: StepPlanner) -> None:
        assert (planner.lut[copies.group, copies.blocks] == copies.slots).all()
        rested = self._num_steps - 1 - self._last_use[copies.group, copies.slots]
        assert rested.min() >= copies.rested, "a copy would overwrite what a step that may still run reads"
        self.num_rested += copies.rested > 0
        self._device[copies.group, copies.slots] = self._host[copies.blocks, copies.group]

    def _write(self, row: Row, request: TwinRequest, lut: IntArray) -> None:
        start, end = row.num_computed_tokens, row.num_computed_tokens + row.num_tokens
        tokens = np.arange(start, end)
        blocks = np.array(request.block_ids)[tokens // self._geometry.block_size]
        for group in range(self._geometry.num_groups):
            slots = lut[group, blocks]
            assert (slots > 0).all(), "a token has no slot to be written to"
            tags = request.tags(start, end) + group * GROUP_STRIDE
            self._device[group, slots, tokens % self._geometry.block_size] = tags
            self._last_use[group, slots] = self._num_steps

    def _check_row(self, row: Row, request: TwinRequest, planner: StepPlanner) -> None:
        block_size = self._geometry.block_size
        num_tokens = row.num_computed_tokens + row.num_tokens
        num_blocks, first_written = cdiv(num_tokens, block_size), row.num_computed_tokens // block_size
        block_ids = np.array(request.block_ids[:num_blocks])
        expected = np.full((num_blocks, block_size), GARBAGE, np.int64)
        expected.reshape(-1)[:num_tokens] = request.tags(0, num_tokens)
        is_token = (np.arange(num_blocks * block_size) < num_tokens).reshape(num_blocks, block_size)
        for group, (slots, positions) in enumerate(zip(row.slots, row.positions, strict=True)):
            num_written = num_blocks - first_written
            in_order = positions if row.phase is Phase.PREFILL else positions[-num_written:]
            assert (np.diff(in_order) > 0).all()
            assert np.unique(positions).size == positions.size
            assert positions[-1] == num_blocks - 1
            assert set(range(first_written, num_blocks)) <= set(positions.tolist())
            assert row.evicted_tokens[group] == block_size * (num_blocks - positions.size)
            assert (planner.lut[group, block_ids[positions]] == slots).all()
            self._last_use[group, slots] = self._num_steps
            found = self._device[group, slots] - group * GROUP_STRIDE
            assert (found == expected[positions])[is_token[positions]].all(), "a slot holds something else"
            left_out = np.setdiff1d(np.arange(num_blocks), positions)
            if row.phase is Phase.PREFILL:
                streamed = row.streamed[group]
                assert (streamed == block_ids[left_out]).all()
                on_host = self._host[streamed, group] - group * GROUP_STRIDE
                assert (on_host == expected[left_out]).all(), "the host holds something else"
                self.num_streamed += streamed.size
            else:
                state = planner.requests.get(row.req_id)
                assert state is not None
                self._check_resident_set(self._policy_of(row.req_id), positions, num_tokens, state.extra_blocks)
                assert row.streamed[group].size == 0
                self.num_left_out += left_out.size

    def _check_resident_set(
        self, policy: BudgetPolicy, positions: IntArray, num_tokens: int, extra_blocks: int
    ) -> None:
        num_blocks = cdiv(num_tokens, self._geometry.block_size)
        recent = policy.recent_blocks(num_tokens)
        forced = {*range(policy.sink_blocks(num_tokens)), *range(num_blocks - recent, num_blocks)}
        assert forced <= set(positions.tolist())
        assert positions.size <= policy.most_held(num_tokens) + extra_blocks
        if policy.keeps_all(num_tokens):
            assert positions.size == num_blocks
