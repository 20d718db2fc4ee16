"""The step planner: scheduler steps in, memory plans out.

One plan runs in this order:

1. forget requests that are gone, know new ones, note what each scheduled request computes
2. end fallbacks whose slots are needed; write down what each row reads from now on, which gives slots up
3. take slots: for blocks that decode rows begin or that come to them, then for prefill rows
4. compact block tables; find the requests to score after the step

A decode row changes only when it grows by a block, or a list says who comes into its set and who goes: what a list
brings is in force in the step in which it is applied. In every other step a decode row is the table of the step before.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from math import inf

import numpy as np

from flashmemory_vllm.errors import ConfigError, IntegrityError
from flashmemory_vllm.residency.books import Books
from flashmemory_vllm.residency.budget import BudgetPolicy, cdiv
from flashmemory_vllm.residency.cadence import Cadence
from flashmemory_vllm.residency.counters import Counters
from flashmemory_vllm.residency.decode_rows import DecodeRows
from flashmemory_vllm.residency.fallback import DenseFallback
from flashmemory_vllm.residency.host_lists import HostLists
from flashmemory_vllm.residency.integrity import check_requests
from flashmemory_vllm.residency.prefill_rows import PrefillRows
from flashmemory_vllm.residency.registry import RequestRegistry
from flashmemory_vllm.residency.requests import RequestState, ScheduledRequest
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.tables import row_of
from flashmemory_vllm.residency.types import (
    NOTHING,
    BoolArray,
    Geometry,
    IntArray,
    Phase,
    Selection,
    StepInput,
    StepPlan,
    Usage,
    WriteBacks,
    joined,
)
from flashmemory_vllm.residency.worth import Worth


class StepPlanner:
    """Decides which logical blocks have slots, one scheduler step at a time. Not thread-safe.

    Args:
        geometry: sizes of the paged memory.
        policy: slots of a request; the same that the scheduler's ledger follows.
        tau: decode steps between two selections of a request.
        score_threshold: blocks that a selection scores below get no slot, though there may be room. Default: none.
        max_prefetches: most blocks that come into sets in one step and layer group, but for those of first selections.
            Default: all that are wanted.
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
        self._cadence = Cadence(tau, opening_steps)
        self._slots = SlotTable(geometry)
        self._counters = Counters(self._slots.lifetime_steps, self._slots.idle_steps)
        # One block more than the longest request has: the scheduler may give it ahead
        self._books = Books(
            geometry, self._slots, geometry.num_places, cdiv(policy.max_model_len, policy.block_size) + 1
        )
        self._requests = RequestRegistry(geometry, self._slots, self._books, policy)
        self._lists = HostLists(self._books, score_threshold, Worth() if worth is None else worth)
        fallback = None
        if fallback_share is not None:
            fallback = DenseFallback(fallback_share, geometry.num_slots, self._requests, self._counters)
        most = geometry.num_slots if max_prefetches is None else max_prefetches
        self._decode_rows = DecodeRows(self._slots, self._books, self._lists, self._counters, fallback, most)
        self._prefill_rows = PrefillRows(self._slots, geometry.num_groups)
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
        if selection.scores is None:
            state.at_once = False
        else:
            self._lists.remember(state, selection.scores)
            state.is_offered = True

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
        prefill = [row for row in scheduled if row.phase is Phase.PREFILL]
        self._prefill_rows.settle(prefill)
        selected = self._decode_rows.settle(step_input.step, [row for row in scheduled if row.phase is Phase.DECODE])
        taken = self._books.settle()
        fresh, history = self._prefill_rows.grant(prefill)
        plan = StepPlan(
            step=step_input.step,
            evicted=self._slots.num_evictions - evictions_before,
            fresh=(*taken.fresh, *fresh),
            recalls=(*taken.recalls, *history),
            prefetches=tuple(taken.prefetches),
            write_backs=self._write_backs(scheduled),
            rows={row.state.req_id: row_of(row, self._slots, self._books, self._counters) for row in scheduled},
            due=self._cadence.due(scheduled, self._requests),
            selected=selected,
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
        self._books.clear()
        self._lists.clear()
        self._open = None

    def usage(self) -> Usage:
        """The state of memory now."""
        groups = range(self._geometry.num_groups)
        capacity = self._geometry.num_slots - 1
        held = sum(int(entries.count.sum()) for entries in self._books.groups)
        held += sum(held.size for state in self._requests for held in state.held)
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

    def place_of(self, req_id: str) -> int:
        """Where the tables of a known request lie, on the host and on the device."""
        state = self._requests.get(req_id)
        if state is None:
            raise IntegrityError(f"request {req_id} is not known and has no place")
        return state.place

    def take_edits(self) -> list[IntArray]:
        """Per group, what changed in the tables of decode rows since the last call: see `Entries.take_edits`."""
        return [entries.take_edits() for entries in self._books.groups]

    def held_by(self, state: RequestState) -> list[IntArray]:
        """Per group int32 `[k]`, positions of the blocks that a known request holds, in any order."""
        if not state.is_decoding:
            return state.held
        return [entries.positions_of(state.place) for entries in self._books.groups]

    def resident_mask(self, req_id: str, num_blocks: int) -> BoolArray:
        """Which of a request's first blocks it holds: bool `[G, num_blocks]`, all false if it is gone."""
        mask = np.zeros((self._geometry.num_groups, num_blocks), np.bool_)
        state = self._requests.get(req_id)
        for group, held in enumerate(self.held_by(state) if state is not None else ()):
            mask[group, held[held < num_blocks]] = True
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
        check_requests(self._requests, self._slots, self._books, unwritten)

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
