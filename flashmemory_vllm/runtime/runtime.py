"""One worker's residency runtime: what happens around and inside each forward pass."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from flashmemory_vllm.indexer.base import Selector
from flashmemory_vllm.observability.counters import CounterWriter
from flashmemory_vllm.residency.planner import StepPlanner
from flashmemory_vllm.residency.types import (
    BoolArray,
    DueSelection,
    IntArray,
    Row,
    StepInput,
    StepPlan,
    WriteBacks,
)
from flashmemory_vllm.runtime.prefill import StreamedPrefill
from flashmemory_vllm.runtime.queries import QueryBuffer
from flashmemory_vllm.runtime.report import Reporter
from flashmemory_vllm.runtime.selection import SelectionQueue
from flashmemory_vllm.runtime.shape import AttentionShape
from flashmemory_vllm.runtime.tables import CompactedTable, StepTables
from flashmemory_vllm.transfer.engine import TransferEngine
from flashmemory_vllm.transfer.page_format import PageFormat


@dataclass(frozen=True, slots=True, eq=False)
class RuntimeParts:
    """What a runtime is assembled from.

    Attributes:
        shape: the model's attention layers.
        groups: layer indices of each layer group.
        anchors: layers whose queries and keys feed the selector.
        planner: decides residency.
        engine: moves pages.
        page_format: what lies inside a page.
        selector: scores blocks.
        selections: runs the selector.
        tables: compacted tables.
        queries: captured queries.
        prefill: attention over history that is not on the device.
        counters: this worker's shared counters.
        check_integrity: check every invariant at every step.
        poison: overwrite free slots with NaN at every step.
    """

    shape: AttentionShape
    groups: tuple[tuple[int, ...], ...]
    anchors: tuple[int, ...]
    planner: StepPlanner
    engine: TransferEngine
    page_format: PageFormat
    selector: Selector
    selections: SelectionQueue
    tables: StepTables
    queries: QueryBuffer
    prefill: StreamedPrefill
    counters: CounterWriter
    check_integrity: bool
    poison: bool


class ResidencyRuntime:
    """Drives planner, transfers, tables and selector through the steps of one worker.

    begin   scores that are due -> plan -> recalls (waited for) and prefetches (not waited for)
    forward slot mappings translated, metadata compacted, queries captured, absent history streamed
    end     full blocks written back and indexed, selectors started for requests that are due
    """

    def __init__(self, parts: RuntimeParts) -> None:
        self._parts = parts
        self._anchor_of = {layer: anchor for anchor, layer in enumerate(parts.anchors)}
        self._group_of = {layer: group for group, layers in enumerate(parts.groups) for layer in layers}
        self._report = Reporter(parts.counters, parts.planner, parts.engine)
        self._plan: StepPlan | None = None
        self._rows: list[Row] = []
        self._lut = torch.empty(0)
        self._slot_mappings: list[torch.Tensor] = []
        # An idle server already tells its sizes.
        self._report.publish()

    @property
    def in_step(self) -> bool:
        """Whether a planned step runs now; outside of one, block ids are physical already."""
        return self._plan is not None

    @property
    def layer_names(self) -> tuple[str, ...]:
        """VLLM's names of the attention layers, in depth order."""
        return self._parts.shape.layer_names

    @property
    def num_logical_blocks(self) -> int:
        """N, logical blocks of the scheduler and of the host pool."""
        return self._parts.planner.geometry.num_logical_blocks

    @property
    def index_bytes_per_block(self) -> int:
        """Device bytes of one logical block's index keys."""
        return self._parts.selector.bytes_per_block()

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

    def set_rows(self, req_ids: Sequence[str]) -> None:
        """Learn the order of the batch's rows, before metadata is built."""
        if self._plan is None:
            return
        self._rows = [self._plan.rows[req_id] for req_id in req_ids]
        self._parts.queries.set_rows([row.num_tokens for row in self._rows])
        self._parts.prefill.set_rows(self._rows)

    def translate_slots(self, slot_mapping: torch.Tensor) -> None:
        """Turn logical slot indices into physical ones, in place.

        Args:
            slot_mapping: int64, `block * block_size + offset`; negative entries are padding and stay.
        """
        if self._plan is None:
            return
        block_size = self._parts.shape.block_size
        blocks = torch.div(slot_mapping, block_size, rounding_mode="floor").clamp_(min=0)
        offsets = slot_mapping - blocks * block_size
        padding = slot_mapping < 0
        self._slot_mappings = [
            torch.where(padding, slot_mapping, lut[blocks] * block_size + offsets).reshape(-1) for lut in self._lut
        ]
        slot_mapping.copy_(self._slot_mappings[0].view_as(slot_mapping))

    def slot_mapping(self, group: int) -> torch.Tensor:
        """This step's slot mapping [T] of a layer group."""
        return self._slot_mappings[group]

    def compacted_tables(self, num_rows: int, seq_lens: torch.Tensor) -> list[CompactedTable]:
        """This step's tables, one for each layer group.

        Args:
            num_rows: rows of the batch, padding included.
            seq_lens: int32 [num_rows], logical lengths on the device.
        """
        return self._parts.tables.fill(self._rows, num_rows, seq_lens)

    def attended(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor
    ) -> None:
        """A layer's attention over its resident blocks is done: capture queries, complete streamed rows.

        Args:
            layer: attention layer index.
            query: [T, Hq, D].
            key: [T, Hkv, D].
            value: [T, Hkv, D].
            output: [T, Hq, D] or [T, Hq * D], completed in place.
        """
        anchor = self._anchor_of.get(layer)
        if anchor is not None:
            self._parts.queries.capture(anchor, query)
        self._parts.prefill.complete(layer, self._group_of[layer], query, key, value, output)

    def reset(self) -> None:
        """Drop all residency: nothing on the device or in the host pool is valid any more."""
        self._parts.engine.synchronize()
        self._parts.planner.reset()
        self._parts.selections.reset()

    def release(self) -> None:
        """Give the host pool back; the runtime must not be used afterwards."""
        self._parts.engine.synchronize()
        self._parts.engine.pool.close()

    def _begin(self, step_input: StepInput) -> None:
        parts = self._parts
        started = time.perf_counter()
        parts.selections.forget([*step_input.finished, *step_input.preempted])
        for selection in parts.selections.deliver(step_input.step):
            parts.planner.offer(selection)
        waited = time.perf_counter() - started
        plan = parts.planner.plan(step_input)
        started = time.perf_counter()
        for copies in plan.recalls:
            parts.engine.recall(copies.group, copies.blocks, copies.slots)
        parts.engine.fence()
        for copies in plan.prefetches:
            parts.engine.recall(copies.group, copies.blocks, copies.slots)
        self._report.stalled(waited + time.perf_counter() - started)
        self._lut = self._upload(parts.planner.lut)
        if parts.check_integrity:
            parts.planner.check_integrity()
        if parts.poison:
            self._poison_free_slots(plan)
        self._plan, self._rows = plan, []

    def _end(self) -> None:
        parts, plan = self._parts, self._plan
        assert plan is not None
        for group, slots in enumerate(plan.write_backs.slots):
            parts.engine.write_back(group, plan.write_backs.blocks, slots)
        self._index_full_blocks(plan.write_backs)
        parts.planner.complete(plan)
        row_of = {row.req_id: index for index, row in enumerate(self._rows)}
        for due in plan.due:
            parts.selections.score(plan.step, due, parts.queries.row(row_of[due.req_id]), self._resident(due))
        self._report.publish()

    def _index_full_blocks(self, full: WriteBacks) -> None:
        """Make the index keys of blocks that became full, from their device pages."""
        parts = self._parts
        if not parts.selector.needs_keys or not len(full.blocks):
            return
        layout, keys = parts.engine.layout, []
        for layer in parts.anchors:
            slots = self._upload(full.slots[self._group_of[layer]])
            pages = layout.page_view(layer).index_select(0, slots)
            keys.append(parts.page_format.keys(layout.unflatten(layer, pages)))
        parts.selector.add_blocks(self._upload(full.blocks), keys)

    def _resident(self, due: DueSelection) -> torch.Tensor | None:
        if due.first:
            return None
        return self._upload_bool(self._parts.planner.resident_mask(due.req_id, len(due.block_ids)))

    def _upload(self, array: IntArray) -> torch.Tensor:
        """Copy host integers to the device as int64 without waiting."""
        tensor = torch.from_numpy(array.astype(np.int64))
        device = self._parts.shape.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    def _upload_bool(self, array: BoolArray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        device = self._parts.shape.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    def _poison_free_slots(self, plan: StepPlan) -> None:
        """Overwrite every slot without an owner with NaN and clear the newly written ones (debugging).

        A block that is being written must not inherit NaN: kernels load whole pages and mask by weight zero.
        """
        parts = self._parts
        for group, layers in enumerate(parts.groups):
            free = self._upload(parts.planner.free_slots(group))
            fresh = [self._upload(copies.slots) for copies in plan.fresh if copies.group == group]
            for layer in layers:
                pages = parts.engine.layout.page_view(layer)
                pages[free] = float("nan")
                for slots in fresh:
                    pages[slots] = 0.0
