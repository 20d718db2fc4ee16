"""The step planner: scheduler steps in, memory plans out.

One plan runs in this order:

1. forget requests that are gone, know new ones, note what each scheduled request computes
2. end fallbacks whose slots are needed
3. settle: each row that changes names the blocks it holds now, gives up others, asks for what is missing
4. grant slots: blocks to be written, recalls, history of dense prefill rows, prefetches
5. compact block tables of what is readable now; find the requests to score after the step

A resident set changes only when its request grows by a block, a selection was offered, or what it chose has yet to
come in: at most so many blocks a step, the rest waits (`residency/resident_set.py`). In every other step a decode
row is the table of the step before.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from math import inf

import numpy as np

from flashmemory_vllm.errors import ConfigError, IntegrityError
from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.residency.cadence import Cadence
from flashmemory_vllm.residency.counters import Counters
from flashmemory_vllm.residency.demand import Demand, joined
from flashmemory_vllm.residency.fallback import DenseFallback
from flashmemory_vllm.residency.integrity import check_requests
from flashmemory_vllm.residency.registry import RequestRegistry
from flashmemory_vllm.residency.requests import ScheduledRequest
from flashmemory_vllm.residency.settling import Settler
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.tables import decode_table, prefill_table
from flashmemory_vllm.residency.types import (
    NOTHING,
    BoolArray,
    Geometry,
    IntArray,
    Phase,
    Row,
    Selection,
    StepInput,
    StepPlan,
    Usage,
    WriteBacks,
)
from flashmemory_vllm.residency.worth import Worth


class StepPlanner:
    """Decides which logical blocks have slots, one scheduler step at a time. Not thread-safe.

    Args:
        geometry: sizes of the paged memory.
        policy: slots of a request; the same that the scheduler's ledger follows.
        tau: decode steps between two selections of a request.
        score_threshold: blocks that a selection scores below get no slot, though there may be room. Default: none.
        max_prefetches: most blocks that one step prefetches in each layer group. Default: all that are wanted.
        fallback_share: selected share above which a request keeps all its blocks while there are slots. Default: never.
        opening_steps: first decode steps of a request that each end with a selection of their own. Default: none.
        worth: how a block's worth follows from its scores. Default: it is the last score.

    Raises:
        ConfigError: `tau` or `max_prefetches` is below 1, or geometry and policy disagree on the block size.
    """

    def __init__(
        self,
        geometry: Geometry,
        policy: BudgetPolicy,
        tau: int,
        score_threshold: float = -inf,
        max_prefetches: int | None = None,
        fallback_share: float | None = None,
        opening_steps: int = 0,
        worth: Worth | None = None,
    ) -> None:
        for name, given in (("tau", tau), ("max_prefetches", max_prefetches)):
            if given is not None and given < 1:
                raise ConfigError(f"{name}: {given} is given, at least 1 is allowed")
        if geometry.block_size != policy.block_size:
            raise ConfigError(f"block_size: the geometry has {geometry.block_size}, the policy {policy.block_size}")
        self._geometry = geometry
        self._max_prefetches = geometry.num_slots if max_prefetches is None else max_prefetches
        self._cadence = Cadence(tau, opening_steps)
        self._slots = SlotTable(geometry)
        self._counters = Counters(self._slots.lifetime_steps, self._slots.idle_steps)
        self._requests = RequestRegistry(geometry, self._slots, policy)
        self._fallback: DenseFallback | None = None
        if fallback_share is not None:
            self._fallback = DenseFallback(
                fallback_share, score_threshold, geometry.num_slots, self._requests, self._counters
            )
        self._worth = Worth() if worth is None else worth
        self._settler = Settler(self._slots, self._counters, score_threshold, self._fallback, self._worth)
        self._open: StepPlan | None = None
        self._lut_view = self._slots.lut.view()
        self._lut_view.flags.writeable = False

    @property
    def geometry(self) -> Geometry:
        """Sizes of the paged memory."""
        return self._geometry

    @property
    def lut(self) -> IntArray:
        """int32 `[G, N]` slot of each logical block, -1 if none. A read-only view that stays current."""
        return self._lut_view

    @property
    def counters(self) -> Counters:
        """Running totals, live."""
        return self._counters

    @property
    def requests(self) -> RequestRegistry:
        """The known requests, live; for reading only."""
        return self._requests

    def offer(self, selection: Selection) -> None:
        """Hand in a selector's scores; they take effect at the next plan that schedules the request.

        A selection for a request that is gone or in prefill is ignored. After one without scores the request goes on
        as it is.

        Raises:
            IntegrityError: the scores are of another number of groups, or of more blocks than the request has
                filled, or there is no order between them.
        """
        state = self._requests.get(selection.req_id)
        if state is None or state.num_tokens < state.prefill_len:
            self._counters.ignored_selections += 1
            return
        if state.asked_at:
            latency = time.perf_counter() - state.asked_at.pop(0)
            self._counters.selection_latency_seconds.observe(np.array([latency]))
        scores, num_full = selection.scores, state.num_tokens // self._geometry.block_size
        if scores is None:
            state.at_once = False
            return
        if scores.ndim != 2 or scores.shape[0] != self._geometry.num_groups or scores.shape[1] > num_full:
            raise IntegrityError(
                f"request {selection.req_id}: scores of shape {scores.shape}, "
                f"allowed are {self._geometry.num_groups} groups of at most {num_full} blocks"
            )
        if np.isnan(scores).any():
            raise IntegrityError(f"request {selection.req_id}: a score is NaN, allowed are numbers")
        since = state.num_tokens - state.remembered_at
        state.memory = self._worth.remember(scores.astype(np.float32), state.memory, since)
        state.remembered_at = state.num_tokens
        state.offered = self._worth.of(state.memory)

    def hasten(self, req_ids: Iterable[str]) -> None:
        """Make requests due in their next step, as far as the cap on selections allows.

        Those that are gone, keep all their blocks, were not due before or are due anyway go on as they are.
        """
        for req_id in req_ids:
            state = self._requests.get(req_id)
            if state is not None and not state.falls_back and self._cadence.hasten(state):
                self._counters.drift_selections += 1

    def plan(self, step_input: StepInput) -> StepPlan:
        """Plan the memory of one step. Every plan is to be completed before the next one is made.

        Raises:
            IntegrityError: the step contradicts what is known, or needs more slots than there are, of which neither
                happens under a scheduler whose ledger counts them. The planner is then unusable until `reset`.
        """
        if self._open is not None:
            raise IntegrityError(f"step {step_input.step} is planned while step {self._open.step} is not complete")
        evictions_before = self._slots.num_evictions
        self._slots.begin_step()
        scheduled = self._requests.schedule(step_input)
        demand = Demand(self._geometry.num_groups, self._max_prefetches)
        for state in self._fallback.revoke() if self._fallback is not None else ():
            self._settler.give_back(state, demand)
        for row in scheduled:
            self._settler.settle(row, demand)
        granted = demand.grant(self._slots, self._requests)
        plan = StepPlan(
            step=step_input.step,
            evicted=self._slots.num_evictions - evictions_before,
            fresh=granted.fresh,
            recalls=granted.recalls,
            prefetches=granted.prefetches,
            write_backs=self._write_backs(scheduled),
            rows={row.state.req_id: self._row(row) for row in scheduled},
            due=self._cadence.due(scheduled, self._requests),
        )
        self._count(plan)
        self._open = plan
        return plan

    def complete(self, step_plan: StepPlan) -> None:
        """Note that the forward of a plan is done and its write-backs are issued: its full blocks are CLEAN.

        The scores of its due selections are asked for now.

        Raises:
            IntegrityError: another plan is open, or none.
        """
        if step_plan is not self._open:
            expected = "none" if self._open is None else f"step {self._open.step}"
            raise IntegrityError(f"step {step_plan.step} completes, but the open plan is {expected}")
        self._slots.mark_written_back(step_plan.write_backs.blocks)
        self._counters.written_back_blocks += step_plan.write_backs.slots.size
        for due in step_plan.due:
            state = self._requests.get(due.req_id)
            if state is not None:
                state.asked_at.append(time.perf_counter())
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
        held = sum(resident.held.size for state in self._requests for resident in state.sets)
        block_size = self._geometry.block_size
        return Usage(
            num_slots=capacity,
            slots_used=max(self._slots.used(group) for group in groups),
            slots_pinned=max(capacity - self._slots.spare(group) for group in groups),
            resident_blocks=held / self._geometry.num_groups,
            total_blocks=sum(-(-state.num_tokens // block_size) for state in self._requests),
            host_blocks=self._slots.num_on_host,
            num_requests=len(self._requests),
        )

    def resident_mask(self, req_id: str, num_blocks: int) -> BoolArray:
        """Which of a request's first blocks it holds: bool `[G, num_blocks]`, all false if it is gone."""
        mask = np.zeros((self._geometry.num_groups, num_blocks), np.bool_)
        state = self._requests.get(req_id)
        if state is not None:
            for group, resident in enumerate(state.sets):
                mask[group, resident.held[resident.held < num_blocks]] = True
        return mask

    def free_slots(self, group: int) -> IntArray:
        """int32 slots of a layer group that hold no block, the null slot excluded."""
        return self._slots.free(group)

    def check_integrity(self) -> None:
        """Check all invariants between slots, content and resident sets; for tests and idle times.

        Raises:
            IntegrityError: with the request or group and the numbers that do not add up.
        """
        self._slots.check_integrity()
        unwritten = NOTHING if self._open is None else self._open.write_backs.blocks
        check_requests(self._requests, self._slots, unwritten)

    def _row(self, row: ScheduledRequest) -> Row:
        state = row.state
        if row.phase is Phase.PREFILL:
            table = prefill_table(row, self._slots)
            self._counters.streamed_blocks += sum(blocks.size for blocks in table.streamed)
        else:
            # While blocks of a set come in, its table is good for one step only.
            table = state.table or decode_table(row, self._slots)
            state.table = table if state.settled_until else None
            self._counters.decode_rows += 1
            self._counters.decode_resident_blocks += table.num_resident
            self._counters.decode_context_blocks += row.end * self._geometry.num_groups
        return Row(
            req_id=state.req_id,
            phase=row.phase,
            num_computed_tokens=row.num_computed_tokens,
            num_tokens=row.num_tokens,
            slots=table.slots,
            positions=table.positions,
            evicted_tokens=table.evicted_tokens,
            streamed=table.streamed,
        )

    def _write_backs(self, scheduled: list[ScheduledRequest]) -> WriteBacks:
        filled = [
            row.state.blocks.ids[row.first_written : row.num_full]
            for row in scheduled
            if row.first_written < row.num_full
        ]
        blocks = joined(filled)
        return WriteBacks(blocks, self._slots.lut[:, blocks])

    def _count(self, plan: StepPlan) -> None:
        counters = self._counters
        counters.plans += 1
        counters.evictions += plan.evicted
        counters.recalled_blocks += sum(copies.blocks.size for copies in plan.recalls)
        counters.prefetched_blocks += sum(copies.blocks.size for copies in plan.prefetches)
