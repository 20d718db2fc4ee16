"""One worker's residency runtime: what happens around and inside each forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from flashmemory_vllm.residency.plan import StepPlan
from flashmemory_vllm.residency.types import Copies, StepInput
from flashmemory_vllm.runtime.history import SelectionHistory
from flashmemory_vllm.runtime.index_keys import index_full_blocks
from flashmemory_vllm.runtime.parts import RuntimeParts, StepBuffers
from flashmemory_vllm.runtime.poison import poison_free_slots, poisoned
from flashmemory_vllm.runtime.report import Reporter
from flashmemory_vllm.runtime.status import StripsAsked, runtime_status
from flashmemory_vllm.runtime.tables import CompactedTable
from flashmemory_vllm.runtime.warm_up import warm_up
from flashmemory_vllm.transfer.checksums import Comparison
from flashmemory_vllm.transfer.engine import Marker, TransferCounters
from flashmemory_vllm.transfer.host_pool import HostPool
from flashmemory_vllm.transfer.step_ends import StepEnds


class ResidencyRuntime:
    """Drives planner, transfers, tables and selector through the steps of one worker.

    begin   lists that are due -> plan -> recalls and prefetches, beside the step before where their slots have rested
    forward tables changed and rows written, metadata compacted, queries captured, absent history streamed
    end     full blocks written back and indexed, sets chosen for the rows that ask, beside the next step
    """

    def __init__(self, parts: RuntimeParts) -> None:
        self._parts = parts
        self._tables, self._queries = parts.buffers.tables, parts.buffers.queries
        self._anchor_of = {layer: anchor for anchor, layer in enumerate(parts.anchors)}
        self._group_of = {layer: group for group, layers in enumerate(parts.groups) for layer in layers}
        self._report = Reporter(parts.counters, parts.planner, parts.engine, parts.choices)
        self._history = SelectionHistory(parts.planner, parts.engine)
        self._ends = StepEnds(parts.engine)
        self._plan: StepPlan | None = None
        self._comparisons: tuple[Comparison, ...] = ()
        # An idle server already tells its sizes.
        self._report.publish()

    @property
    def in_step(self) -> bool:
        """Whether a planned step runs now; outside of one, block ids are physical already."""
        return self._plan is not None

    @property
    def parts(self) -> RuntimeParts:
        """What it is assembled from."""
        return self._parts

    @property
    def num_logical_blocks(self) -> int:
        """N, logical blocks of the scheduler and of the host pool."""
        return self._parts.planner.geometry.num_logical_blocks

    @property
    def last_slot_token(self) -> int:
        """The largest entry that a slot mapping may have."""
        geometry = self._parts.planner.geometry
        return geometry.num_slots * geometry.block_size - 1

    @property
    def index_bytes_per_block(self) -> int:
        """Device bytes of one logical block's index keys."""
        return self._parts.selector.bytes_per_block()

    @property
    def moved(self) -> TransferCounters:
        """Totals of what was copied and compared."""
        return self._parts.engine.counters

    @property
    def buffers(self) -> StepBuffers:
        """For a runtime that takes this one's place."""
        return self._parts.buffers

    @property
    def pool(self) -> HostPool:
        """The host tier, likewise."""
        return self._parts.engine.pool

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Layer indices of each layer group."""
        return self._parts.groups

    @property
    def anchors(self) -> tuple[int, ...]:
        """Layers whose queries and keys feed the selector."""
        return self._parts.anchors

    @property
    def max_rows(self) -> int:
        """Most rows of a batch, padding included."""
        return self._tables.sizes.max_rows

    @property
    def needs_python(self) -> bool:
        """Whether this step may stream history, which the replay of a captured graph would leave out."""
        return self._plan is not None and self._plan.may_stream

    def group_of(self, layer: int) -> int:
        """The layer group of an attention layer."""
        return self._group_of[layer]

    @contextmanager
    def step(self, step_input: StepInput) -> Iterator[None]:
        """Run one step's forward pass inside.

        Args:
            step_input: what vLLM scheduled.
        """
        self._begin(step_input)
        try:
            yield
            self._end()
        finally:
            self._plan = None

    def set_batch(self, req_ids: Sequence[str], seq_lens: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Learn the order of the batch's rows, before metadata is built, and where its tokens are written.

        Args:
            req_ids: the step's requests in the order of the rows.
            seq_lens: int32 [R] logical lengths on the device; rows of padding come last and have 0.
            slot_mapping: int64 [T], padding included; becomes that of layer group 0.
        """
        if self._plan is None:
            self._tables.write_nothing()
            slot_mapping.clamp_(max=self.last_slot_token)
            return
        batch, num_tokens = self._plan.rows.batch(req_ids), len(slot_mapping)
        self._tables.know_blocks(self._plan.asked)
        self._tables.write(batch, seq_lens, num_tokens, self._parts.planner.take_edits())
        # vLLM shares this tensor with all who write by it
        slot_mapping.copy_(self._tables.slot_mapping(0, num_tokens))
        self._parts.questions.set_rows(batch, self._prompt_len)
        self._parts.prefill.set_rows(batch)

    def slot_mapping(self, group: int, num_tokens: int) -> torch.Tensor:
        """This step's slot mapping [T] of a layer group, always in the same memory."""
        return self._tables.slot_mapping(group, num_tokens)

    def compacted_tables(self, num_rows: int) -> list[CompactedTable]:
        """This step's tables, one for each layer group, always in the same memory.

        Args:
            num_rows: rows that attention computes, padding included.
        """
        return self._tables.compacted(num_rows)

    def physical_tables(
        self, block_table: torch.Tensor, seq_lens: torch.Tensor, slot_mapping: torch.Tensor, max_seq_len: int
    ) -> list[CompactedTable]:
        """As `compacted_tables` outside of a step, where vLLM's block ids are slots already.

        Args:
            block_table: int32 [R, w] slots, or blocks of native layers, of which there may be more: noise in any case.
            seq_lens: int32 [R].
            slot_mapping: int64 [T], likewise.
            max_seq_len: upper bound that the batch is to be computed with.
        """
        slots = block_table.clamp(max=self._parts.planner.geometry.num_slots - 1)
        return self._tables.pass_through(slots, seq_lens, slot_mapping.clamp(max=self.last_slot_token), max_seq_len)

    def is_heard(self, layer: int) -> bool:
        """Whether `attended` does anything with what this layer's queries are in this step."""
        return layer in self._anchor_of or (self._plan is not None and self._parts.prefill.is_streaming)

    def attended(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        first_token: int = 0,
    ) -> list[slice]:
        """A layer's attention over its resident blocks is done: capture queries, complete streamed rows.

        Of several runs of a batch the last one comes first. A CUDA graph may capture this where every row has one token
        and none is streamed.

        Args:
            layer: attention layer index.
            query: [T, Hq, D], of a run of the batch's tokens.
            key: [T, Hkv, D].
            value: [T, Hkv, Dv].
            output: [T, Hq, Dv] or [T, Hq * Dv], completed in place.
            first_token: where the run begins in the batch. Default: 0.

        Returns:
            Which tokens of the run were completed, row by row.
        """
        anchor = self._anchor_of.get(layer)
        if anchor is not None:
            self._queries.capture(anchor, query, self._tables.query_row(len(query), first_token))
            self._parts.questions.capture(anchor, query, first_token)
        if self._plan is None:
            return []
        return self._parts.prefill.complete(layer, self._group_of[layer], query, key, value, output, first_token)

    def take_comparisons(self) -> tuple[Comparison, ...]:
        """Whether the pages that the steps since the last call read are those that were saved."""
        taken, self._comparisons = self._comparisons, ()
        return taken

    def warm_up(self) -> None:
        """Run every kernel once on the null block and the null slot, so that no request waits for a compiler."""
        warm_up(self._parts)

    def status(self, client_id: Callable[[str], str], strips: StripsAsked) -> dict[str, Any]:
        """The fields of `RuntimeStatus` between two steps; `client_id` turns the engine's request ids into others."""
        return runtime_status(self._parts.planner, self._history, client_id, strips)

    def synchronize(self) -> None:
        """Block until all issued copies have landed."""
        self._parts.engine.synchronize()

    def reset(self) -> None:
        """Drop all residency: nothing on the device or in the host pool is valid any more."""
        self.synchronize()
        self._parts.planner.reset()
        self._parts.choices.reset()
        self._parts.questions.reset()
        self._tables.reset()

    def release(self) -> None:
        """Give the host pool back, whatever became of the last copies; the runtime must not be used afterwards."""
        try:
            self.synchronize()
        finally:
            self.pool.close()

    def _begin(self, step_input: StepInput) -> None:
        parts = self._parts
        parts.choices.forget(step_input.finished)
        parts.questions.forget(step_input.finished)
        for req_id in step_input.preempted:
            self._park(req_id)
        plan = parts.planner.plan(step_input, parts.choices.take(step_input.step))
        # First those that nothing has to be waited for
        for copies in sorted((*plan.recalls, *plan.prefetches), key=attrgetter("rested"), reverse=True):
            parts.engine.recall(copies.group, copies.blocks, copies.slots, self._last_use(copies))
        parts.engine.fence((*plan.fresh, *poisoned(parts)))
        self._history.note(plan)
        if parts.check_integrity:
            parts.planner.check_integrity()
        if parts.poison:
            poison_free_slots(parts, plan)
        self._plan = plan

    def _end(self) -> None:
        parts, plan = self._parts, self._plan
        assert plan is not None
        for group, slots in enumerate(plan.write_backs.slots):
            parts.engine.write_back(group, plan.write_backs.blocks, slots)
        index_full_blocks(parts, plan.write_backs)
        parts.planner.complete(plan)
        new = [plan.asked[row] for row in np.flatnonzero(plan.asked.is_new).tolist()]
        questions = {one.req_id: parts.questions.earlier(one) for one in new}
        parts.choices.choose(
            plan.step, plan.asked, {req_id: earlier for req_id, earlier in questions.items() if earlier is not None}
        )
        if parts.check_integrity and parts.shape.device.type == "cpu":
            for place, epoch, sets in parts.planner.sets():
                parts.choices.check_sets(place, epoch, sets)
        self._ends.add()
        self._comparisons += parts.engine.take_comparisons()
        self._report.publish()

    def _last_use(self, copies: Copies) -> Marker | None:
        """What a copy from the host has to wait for; poison is written to slots that nobody has."""
        return self._parts.engine.marker() if self._parts.poison else self._ends.before(copies.rested)

    def _park(self, req_id: str) -> None:
        """Keep what is remembered of a request that loses its place."""
        state = self._parts.planner.requests.get(req_id)
        if state is not None:
            self._parts.choices.park(req_id, state.place, state.num_tokens // state.policy.block_size)

    def _prompt_len(self, req_id: str) -> int:
        state = self._parts.planner.requests.get(req_id)
        assert state is not None  # it is scheduled
        return state.prompt_len
