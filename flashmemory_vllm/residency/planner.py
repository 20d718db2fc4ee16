"""The step planner: scheduler steps in, memory plans out.

One plan runs in this order:

1. forget requests that are gone, know new ones, note what each scheduled request computes
2. end fallbacks whose slots are needed; write down what each row reads from now on, which gives slots up
3. take slots: for blocks that decode rows begin or that come to them, then for prefill rows
4. compact block tables; find the requests to score after the step

What most decode rows need in most steps is done for all of them at once, with arrays: see `ScheduledRows`.

A decode row changes only when it grows by a block, or a list says who comes into its set and who goes: what a list
brings is in force in the step in which it is applied. In every other step a decode row is the table of the step before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from flashmemory_vllm.errors import ConfigError, IntegrityError
from flashmemory_vllm.residency.asking import Asking
from flashmemory_vllm.residency.batch import Batch, PlannedRows
from flashmemory_vllm.residency.books import Books
from flashmemory_vllm.residency.budget import BudgetPolicy, cdiv
from flashmemory_vllm.residency.counters import Counters
from flashmemory_vllm.residency.decode_rows import DecodeRows
from flashmemory_vllm.residency.fallback import DenseFallback
from flashmemory_vllm.residency.integrity import check_requests
from flashmemory_vllm.residency.lists import Chosen
from flashmemory_vllm.residency.noting import ListNotes
from flashmemory_vllm.residency.plan import StepPlan
from flashmemory_vllm.residency.prefill_rows import PrefillRows
from flashmemory_vllm.residency.registry import RequestRegistry
from flashmemory_vllm.residency.requests import RequestState, ScheduledRequest, ScheduledRows
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.tables import decode_row, prefill_row
from flashmemory_vllm.residency.types import (
    NOTHING,
    Geometry,
    IntArray,
    Row,
    StepInput,
    Usage,
    WriteBacks,
    joined,
)


class StepPlanner:
    """Decides which logical blocks have slots, one scheduler step at a time. Not thread-safe.

    Args:
        geometry: sizes of the paged memory.
        policy: slots of a request; the same that the scheduler's ledger follows.
        tau: decode steps between two selections of a request.
        max_prefetches: most blocks that come into sets in one step and layer group, but for those of first selections.
            Default: all that are wanted.
        fallback_share: selected share above which a request keeps all its blocks while there are slots. Default: never.
        opening_steps: first decode steps of a request that each end with a selection of their own. Default: none.
        is_quick: most of what a step does is done by loops that are compiled, which takes seconds if they never were.
            Default: False.

    Raises:
        ConfigError: `tau` or `max_prefetches` is below 1, or geometry and policy disagree on the block size.
    """

    def __init__(
        self,
        geometry: Geometry,
        policy: BudgetPolicy,
        tau: int,
        max_prefetches: int | None = None,
        fallback_share: float | None = None,
        opening_steps: int = 0,
        *,
        is_quick: bool = False,
    ) -> None:
        for name, given in (("tau", tau), ("max_prefetches", max_prefetches)):
            if given is not None and given < 1:
                raise ConfigError(f"{name}: {given} is given, at least 1 is allowed")
        if geometry.block_size != policy.block_size:
            raise ConfigError(f"block_size: the geometry has {geometry.block_size}, the policy {policy.block_size}")
        self._geometry = geometry
        self._slots = SlotTable(geometry)
        self._counters = Counters(self._slots.lifetime_steps, self._slots.idle_steps)
        # One block more than the longest request has: the scheduler may give it ahead
        books_of, notes_of, asking_of = _quick() if is_quick else (Books, ListNotes, Asking)
        self._books = books_of(
            geometry, self._slots, geometry.num_places, cdiv(policy.max_model_len, policy.block_size) + 1
        )
        self._requests = RequestRegistry(geometry, self._slots, self._books, policy)
        fallback = None
        if fallback_share is not None:
            fallback = DenseFallback(fallback_share, geometry.num_slots, self._requests, self._counters)
        most = geometry.num_slots if max_prefetches is None else max_prefetches
        self._asking = asking_of(tau, opening_steps, most, self._requests, self._books)
        notes = notes_of(self._books, self._requests, self._counters, fallback, self._asking.lacks_chosen)
        self._decode_rows = DecodeRows(self._slots, self._books, self._requests, self._counters, fallback, most, notes)
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

    def plan(self, step_input: StepInput, lists: Sequence[Chosen] = ()) -> StepPlan:
        """Plan the memory of one step. Every plan is to be completed before the next one is made.

        Args:
            step_input: what vLLM scheduled.
            lists: what was chosen at the end of earlier steps and comes into force now, in this order. Rows of requests
                that are gone are ignored.

        Raises:
            IntegrityError: the step contradicts what is known, or needs more slots than there are, of which neither
                happens under a scheduler whose ledger counts them. The planner is then unusable until `reset`.
        """
        if self._open is not None:
            raise IntegrityError(f"step {step_input.step} is planned while step {self._open.step} is not complete")
        evictions_before = self._slots.num_evictions
        self._slots.begin_step()
        rows = self._requests.schedule(step_input)
        prefill = rows.rows_of(rows.is_prefill)
        decode = rows.take(~rows.is_prefill) if prefill else rows
        self._prefill_rows.settle(prefill)
        selected = self._decode_rows.settle(step_input.step, decode, lists)
        taken = self._books.settle()
        fresh, history = self._prefill_rows.grant(prefill)
        plan = StepPlan(
            step=step_input.step,
            evicted=self._slots.num_evictions - evictions_before,
            fresh=(*taken.fresh, *fresh),
            recalls=(*taken.recalls, *history),
            prefetches=tuple(taken.prefetches),
            write_backs=self._write_backs(rows),
            rows=self._planned(rows, prefill),
            asked=self._asking.asked(rows),
            selected=selected,
        )
        self._count(plan)
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
        self._books.clear()
        self._open = None

    def usage(self) -> Usage:
        """The state of memory now."""
        groups = range(self._geometry.num_groups)
        capacity = self._geometry.num_slots - 1
        held = sum(int(entries.count.sum()) for entries in self._books.groups)
        held += sum(own.size for state in self._requests if not state.is_decoding for own in state.held)
        return Usage(
            num_slots=capacity,
            slots_used=max(self._slots.used(group) for group in groups),
            slots_pinned=max(capacity - self._slots.spare(group) for group in groups),
            resident_blocks=held / self._geometry.num_groups,
            total_blocks=self._requests.num_blocks,
            host_blocks=self._slots.num_on_host,
            num_requests=len(self._requests),
        )

    def take_edits(self) -> list[IntArray]:
        """Per group, what changed in the tables of decode rows since the last call: see `Entries.take_edits`."""
        return [entries.take_edits() for entries in self._books.groups]

    def held_by(self, state: RequestState) -> list[IntArray]:
        """Per group int32 `[k]`, positions of the blocks that a known request holds, in any order."""
        if not state.is_decoding:
            return state.held
        return [entries.positions_of(state.place) for entries in self._books.groups]

    def tables_of(self, places: Sequence[int]) -> list[tuple[IntArray, IntArray]]:
        """What decode rows at these places read: per group positions int32 `[n, k]` in any order, `[n]` how many."""
        place = np.array(places, np.int32)
        return [entries.copied(place) for entries in self._books.groups]

    def sets(self) -> Iterator[tuple[int, int, list[IntArray]]]:
        """Place, tenant and per group the set of each request whose set was chosen: int32 `[k]` positions."""
        for state in self._requests:
            if state.has_set:
                place = state.place
                yield (
                    place,
                    int(self._books.epoch[place]),
                    [
                        positions[~entries.is_extra[place, positions]]
                        for entries in self._books.groups
                        for positions in (entries.positions_of(place),)
                    ],
                )

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

    def _write_backs(self, rows: ScheduledRows) -> WriteBacks:
        ids = self._books.ids
        filled = [
            ids[rows.place[index], rows.first_written[index] : rows.num_full[index]]
            for index in np.flatnonzero(rows.first_written < rows.num_full).tolist()
        ]
        blocks = joined(filled)
        return WriteBacks(blocks, self._slots.lut[:, blocks])

    def _planned(self, rows: ScheduledRows, prefill: Sequence[ScheduledRequest]) -> PlannedRows:
        """What all rows read and write, once all blocks have their slots."""
        tables = [prefill_row(row, self._slots) for row in prefill]
        at = dict(zip(np.flatnonzero(rows.is_prefill).tolist(), tables, strict=True))
        num_blocks = np.stack([entries.count[rows.place] for entries in self._books.groups], axis=1)
        evicted = rows.block_size * (rows.end[:, None] - num_blocks)
        for index, row in at.items():
            evicted[index] = row.evicted_tokens
        batch = Batch(rows.place, rows.num_computed_tokens, rows.num_tokens, evicted, at)
        counters, number = self._counters, self._counters.plans
        counters.streamed_blocks += sum(blocks.size for row in tables for blocks in row.streamed)
        counters.decode_rows += len(rows) - len(prefill)
        counters.decode_resident_blocks += int(num_blocks.sum())
        counters.decode_context_blocks += int(rows.end[~rows.is_prefill].sum()) * len(self._books.groups)

        def read(index: int) -> Row:
            if number + 1 != counters.plans:
                raise IntegrityError(f"the rows of plan {number} are asked for, but plan {counters.plans - 1} was made")
            return decode_row(rows.row(index), self._books)

        return PlannedRows([state.req_id for state in rows.states], batch, read)

    def _count(self, plan: StepPlan) -> None:
        counters = self._counters
        counters.plans += 1
        counters.evictions += plan.evicted
        counters.recalled_blocks += sum(copies.blocks.size for copies in plan.recalls)
        counters.prefetched_blocks += sum(copies.blocks.size for copies in plan.prefetches)


def _quick() -> tuple[type[Books], type[ListNotes], type[Asking]]:
    from flashmemory_vllm.residency.quick.asking import QuickAsking
    from flashmemory_vllm.residency.quick.books import QuickBooks
    from flashmemory_vllm.residency.quick.notes import QuickNotes

    return QuickBooks, QuickNotes, QuickAsking
