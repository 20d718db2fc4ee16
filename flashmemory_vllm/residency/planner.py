"""The step planner: scheduler steps in, memory plans out.

One plan runs in this order:

1. forget requests that are gone, know new ones, note what each scheduled request computes
2. settle: each row that changes names the blocks it holds from now on, gives up the rest, asks for what has no slot
3. grant slots: blocks to be written, recalls, history of dense prefill rows, prefetches
4. compact block tables of what is readable now; find the requests to score after the step

A resident set changes only in 2, and only when its request grows by a block, a selection was offered, or its prefetches
have landed. In every other step a decode row is the table of the step before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np

from flashmemory_vllm.errors import ConfigError, IntegrityError, UnsupportedError
from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.residency.cadence import Cadence
from flashmemory_vllm.residency.demand import Demand, Granted, joined
from flashmemory_vllm.residency.integrity import check_requests
from flashmemory_vllm.residency.ranking import NO_POSITIONS, Frame, best, difference, worst_to_best
from flashmemory_vllm.residency.requests import RequestState, ScheduledRequest, Table
from flashmemory_vllm.residency.slots import NULL_BLOCK, SlotTable
from flashmemory_vllm.residency.tables import decode_table, prefill_table
from flashmemory_vllm.residency.types import (
    Counters,
    Geometry,
    IntArray,
    NewRequest,
    Phase,
    Row,
    RunningRequest,
    Selection,
    StepInput,
    StepPlan,
    Usage,
    WriteBacks,
)


class StepPlanner:
    """Decides which logical blocks have slots, one scheduler step at a time. Not thread-safe.

    Args:
        geometry: sizes of the paged memory.
        policy: slots of a request; the same that the scheduler's ledger follows.
        tau: decode steps between two selections of a request.

    Raises:
        ConfigError: `tau` is below 1, or geometry and policy disagree on the block size.
    """

    def __init__(self, geometry: Geometry, policy: BudgetPolicy, tau: int) -> None:
        if tau < 1:
            raise ConfigError(f"tau: {tau} is given, at least 1 is allowed")
        if geometry.block_size != policy.block_size:
            raise ConfigError(f"block_size: the geometry has {geometry.block_size}, the policy {policy.block_size}")
        self._geometry = geometry
        self._policy = policy
        self._cadence = Cadence(policy, tau)
        self._slots = SlotTable(geometry)
        self._requests: dict[str, RequestState] = {}
        self._open: StepPlan | None = None
        self._counters = Counters()
        self._lut_view = self._slots.lut.view()
        self._lut_view.flags.writeable = False

    @property
    def lut(self) -> IntArray:
        """int32 `[G, N]` slot of each logical block, -1 if it has none. One read-only array that changes in place."""
        return self._lut_view

    @property
    def counters(self) -> Counters:
        """Running totals, live."""
        return self._counters

    def offer(self, selection: Selection) -> None:
        """Hand in a selector's scores; they shape the resident set from the next plan that schedules the request.

        A selection for a request that is gone or in prefill is ignored.

        Raises:
            IntegrityError: the scores are of another number of groups, or of more blocks than the request has filled.
        """
        state = self._requests.get(selection.req_id)
        if state is None or state.num_tokens < state.prefill_len:
            self._counters.ignored_selections += 1
            return
        scores, num_full = selection.scores, state.num_tokens // self._geometry.block_size
        if scores.ndim != 2 or scores.shape[0] != self._geometry.num_groups or scores.shape[1] > num_full:
            raise IntegrityError(
                f"request {selection.req_id}: scores of shape {scores.shape}, "
                f"allowed are {self._geometry.num_groups} groups of at most {num_full} blocks"
            )
        state.offered = np.where(np.isnan(scores), -np.inf, scores).astype(np.float32)

    def plan(self, step_input: StepInput) -> StepPlan:
        """Plan the memory of one step. Every plan is to be completed before the next one is made.

        Raises:
            IntegrityError: the step contradicts what is known, or needs more slots than there are. The planner is
                then unusable until `reset`.
            UnsupportedError: the scheduler does something this planner has no answer to.
        """
        if self._open is not None:
            raise IntegrityError(f"step {step_input.step} is planned while step {self._open.step} is not complete")
        evictions_before = self._slots.num_evictions
        self._slots.begin_step()
        for req_id in chain(step_input.finished, step_input.preempted):
            self._forget(req_id)
        scheduled = self._schedule(step_input)
        demand = Demand(self._geometry.num_groups)
        for row in scheduled:
            self._settle(row, demand)
        granted = demand.grant(self._slots)
        plan = StepPlan(
            step=step_input.step,
            evicted=self._slots.num_evictions - evictions_before,
            fresh=granted.fresh,
            recalls=granted.recalls,
            prefetches=granted.prefetches,
            write_backs=self._write_backs(scheduled),
            rows={row.state.req_id: self._row(row) for row in scheduled},
            due=self._cadence.due(scheduled),
        )
        self._count(plan, granted)
        self._open = plan
        return plan

    def complete(self, step_plan: StepPlan) -> None:
        """Note that the forward of a plan is done and its write-backs are issued: its full blocks are CLEAN.

        Raises:
            IntegrityError: another plan is open, or none.
        """
        if step_plan is not self._open:
            expected = "none" if self._open is None else f"step {self._open.step}"
            raise IntegrityError(f"step {step_plan.step} completes, but the open plan is {expected}")
        self._slots.mark_written_back(step_plan.write_backs.blocks)
        self._counters.written_back_blocks += step_plan.write_backs.slots.size
        self._open = None

    def reset(self) -> None:
        """Forget all requests and all content, on the device and on the host. Counters go on."""
        self._slots.clear()
        self._requests.clear()
        self._open = None

    def usage(self) -> Usage:
        """The state of memory now."""
        groups = range(self._geometry.num_groups)
        capacity = self._geometry.num_slots - 1
        held = sum(held.size for state in self._requests.values() for held in state.held)
        block_size = self._geometry.block_size
        return Usage(
            num_slots=capacity,
            slots_used=max(self._slots.used(group) for group in groups),
            slots_pinned=max(capacity - self._slots.spare(group) for group in groups),
            resident_blocks=held / self._geometry.num_groups,
            total_blocks=sum(-(-state.num_tokens // block_size) for state in self._requests.values()),
            host_blocks=int(np.count_nonzero(self._slots.host_valid)),
            num_requests=len(self._requests),
        )

    def check_integrity(self) -> None:
        """Check all invariants between slots, content and resident sets; for tests and idle times.

        Raises:
            IntegrityError: with the request or group and the numbers that do not add up.
        """
        self._slots.check_integrity()
        unwritten = NO_POSITIONS if self._open is None else self._open.write_backs.blocks
        check_requests(self._requests.values(), self._slots, self._policy, unwritten)

    def _forget(self, req_id: str) -> None:
        state = self._requests.pop(req_id, None)
        if state is None:
            return
        ids = state.blocks.ids
        for group, held in enumerate(state.held):
            self._slots.unpin(group, ids[held])
        if state.num_tokens % self._geometry.block_size:
            tail = state.num_tokens // self._geometry.block_size
            self._slots.drop(ids[tail : tail + 1])

    def _schedule(self, step_input: StepInput) -> list[ScheduledRequest]:
        added = [self._admit(new) for new in step_input.new]
        added += [self._extend(running) for running in step_input.running if running.new_block_ids]
        # The scheduler gave these ids to other tokens: whatever they held is gone.
        self._slots.drop(joined(added))
        computed = {one.req_id: one.num_computed_tokens for one in chain(step_input.new, step_input.running)}
        return [
            self._scheduled(req_id, num_tokens, computed)
            for req_id, num_tokens in step_input.num_scheduled_tokens.items()
        ]

    def _admit(self, new: NewRequest) -> IntArray:
        num_hits, rest = divmod(new.num_computed_tokens, self._geometry.block_size)
        if rest:
            raise UnsupportedError(
                f"request {new.req_id}: a prefix hit of {new.num_computed_tokens} tokens is given, "
                f"allowed are multiples of the block size {self._geometry.block_size}"
            )
        self._forget(new.req_id)
        state = RequestState.begin(
            new.req_id, new.prefill_len, new.num_computed_tokens, self._geometry.num_groups
        )
        self._requests[new.req_id] = state
        return self._append(state, new.block_ids)[num_hits:]

    def _extend(self, running: RunningRequest) -> IntArray:
        return self._append(self._known(running.req_id), running.new_block_ids)

    def _append(self, state: RequestState, block_ids: Sequence[int]) -> IntArray:
        start = len(state.blocks)
        state.blocks.extend(block_ids)
        added = state.blocks.ids[start:]
        if added.size and not NULL_BLOCK < added.min() <= added.max() < self._geometry.num_logical_blocks:
            raise IntegrityError(
                f"request {state.req_id}: blocks {added.min()} to {added.max()} are given, "
                f"allowed are {NULL_BLOCK + 1} to {self._geometry.num_logical_blocks - 1}"
            )
        return added

    def _known(self, req_id: str) -> RequestState:
        state = self._requests.get(req_id)
        if state is None:
            raise IntegrityError(f"request {req_id} goes on running but is not known")
        return state

    def _scheduled(self, req_id: str, num_tokens: int, computed: Mapping[str, int]) -> ScheduledRequest:
        state = self._known(req_id)
        if computed.get(req_id) != state.num_tokens:
            raise IntegrityError(
                f"request {req_id}: the step begins at token {computed.get(req_id)}, the last one ended at {state.num_tokens}"
            )
        row = ScheduledRequest(state, state.num_tokens, num_tokens, self._geometry.block_size)
        state.num_tokens = row.num_tokens_after
        return row

    def _settle(self, row: ScheduledRequest, demand: Demand) -> None:
        if row.phase is Phase.PREFILL:
            self._settle_prefill(row, demand)
        else:
            self._settle_decode(row, demand)

    def _settle_prefill(self, row: ScheduledRequest, demand: Demand) -> None:
        is_dense = self._policy.keeps_all(row.state.prefill_len)
        for group, held in enumerate(row.state.held):
            holds_history = is_dense and held.size == row.first_fresh
            first = 0 if holds_history else row.first_written
            self._change_set(row, group, np.arange(first, row.end, dtype=np.int32), demand)
        demand.fresh.append(row.fresh)
        if is_dense:
            demand.dense_prefills.append(row)
