"""What goes into and comes out of the pager.

Words: a logical block is a page of the scheduler, a slot is a page of the device KV tensor. Layers are split into G
groups; each group has its own slots and its own resident set per request. A position is the index of a block
within its request. Logical block 0 is the scheduler's null block and slot 0 is the null slot: neither ever
holds a token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from flashmemory_vllm.errors import ConfigError

IntArray: TypeAlias = npt.NDArray[np.int32]
LongArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float32]
DoubleArray: TypeAlias = npt.NDArray[np.float64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

NOTHING: IntArray = np.empty(0, np.int32)
NOTHING.flags.writeable = False
NO_SCORES: FloatArray = np.empty(0, np.float32)


def joined(arrays: Sequence[IntArray]) -> IntArray:
    """All the arrays as one."""
    return np.concatenate(arrays) if arrays else NOTHING


def distinct(numbers: IntArray) -> IntArray:
    """Each of the numbers `[n]` once, ascending. As `np.unique` does, which takes three times as long for a few."""
    if numbers.size < 2:
        return numbers
    ordered = np.sort(numbers)
    is_first = np.ones(ordered.size, np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=is_first[1:])
    return ordered[is_first]


def has_repeats(numbers: npt.NDArray[np.integer]) -> bool:
    """Whether one of the numbers `[n]` is given twice."""
    ordered = np.sort(numbers)
    return bool((ordered[1:] == ordered[:-1]).any())


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of the paged memory; filled by the worker once the KV cache is laid out.

    Attributes:
        num_logical_blocks: N, logical blocks the scheduler may hand out, the null block included.
        num_slots: S, device pages of each layer group, the null slot included.
        num_groups: G, layer groups.
        block_size: tokens in a block.
        num_places: P, most requests that have blocks at once. Default: 64.

    Raises:
        ConfigError: a size is too small to hold a single token.
    """

    num_logical_blocks: int
    num_slots: int
    num_groups: int
    block_size: int
    num_places: int = 64

    def __post_init__(self) -> None:
        for name, smallest in (
            ("num_logical_blocks", 2),
            ("num_slots", 2),
            ("num_groups", 1),
            ("block_size", 1),
            ("num_places", 1),
        ):
            given = getattr(self, name)
            if given < smallest:
                raise ConfigError(f"{name}: {given} is given, at least {smallest} is allowed")


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request scheduled for the first time, or again after preemption; filled by the plugin.

    Attributes:
        req_id: vLLM's request id.
        block_ids: logical blocks of the request, in order.
        num_computed_tokens: tokens that have KV already (a prefix hit), a multiple of the block size.
        prefill_len: tokens whose KV dense prefill computes: the prompt, with the outputs so far if it was
            preempted.
        prompt_len: tokens of the prompt alone. Default: None, as many as `prefill_len`.
    """

    req_id: str
    block_ids: tuple[int, ...]
    num_computed_tokens: int
    prefill_len: int
    prompt_len: int | None = None


class RunningRequest(NamedTuple):  # there is one for each row, in each step: a frozen dataclass takes twice as long
    """A known request that is scheduled again; filled by the plugin.

    Attributes:
        req_id: vLLM's request id.
        new_block_ids: logical blocks appended since the request was last scheduled.
        num_computed_tokens: tokens that have KV before this step.
    """

    req_id: str
    new_block_ids: tuple[int, ...]
    num_computed_tokens: int


@dataclass(frozen=True, slots=True)
class StepInput:
    """One scheduler step; filled by the plugin from vLLM's scheduler output.

    Attributes:
        step: number of the step, for messages and for matching `StepPlan.step`.
        finished: requests that ended or were aborted since the last step.
        preempted: requests that lost their blocks in this step.
        new: requests that become known.
        running: known requests that are scheduled again.
        num_scheduled_tokens: tokens this step computes for each scheduled request.
    """

    step: int
    finished: Collection[str]
    preempted: Collection[str]
    new: tuple[NewRequest, ...]
    running: tuple[RunningRequest, ...]
    num_scheduled_tokens: Mapping[str, int]


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """Logical blocks and the slots they have in one layer group; filled by the planner.

    Attributes:
        group: layer group.
        blocks: int32 `[n]` logical blocks.
        slots: int32 `[n]` slots of the same blocks.
        rested: steps between the newest one whose kernels use one of the slots for what it held before, and this one.
            0: the step before this one may still use it.
    """

    group: int
    blocks: IntArray
    slots: IntArray
    rested: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class WriteBacks:
    """Blocks that are full once this step's forward is done; filled by the planner.

    Attributes:
        blocks: int32 `[n]` logical blocks, each in one request only.
        slots: int32 `[G, n]` slots of the same blocks in each layer group.
    """

    blocks: IntArray
    slots: IntArray


class Phase(Enum):
    """How a row's new tokens see their history."""

    PREFILL = "prefill"  # all of it
    DECODE = "decode"  # the resident set


@dataclass(slots=True, eq=False)  # not frozen, which would take three times as long to make
class Row:
    """What one scheduled request reads and writes in this step; filled by the planner. Arrays are read-only.

    Attributes:
        req_id: the request.
        phase: prefill rows attend to all history, decode rows to the resident set.
        num_computed_tokens: tokens that have KV before this step.
        num_tokens: tokens this step computes.
        slots: per group int32 `[k]`, the compacted block table: the blocks written now at the end, in logical order;
            those before them likewise in a prefill row, in any order in a decode row.
        positions: per group int32 `[k]`, logical positions of the same blocks.
        evicted_tokens: per group, tokens of history that the compacted table leaves out.
        streamed: per group int32 `[m]`, logical blocks of exactly these left-out tokens, in logical order,
            for a prefill row to read from the host; empty for a decode row, which does without them.
    """

    req_id: str
    phase: Phase
    num_computed_tokens: int
    num_tokens: int
    slots: tuple[IntArray, ...]
    positions: tuple[IntArray, ...]
    evicted_tokens: tuple[int, ...]
    streamed: tuple[IntArray, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """The state of memory between two steps; filled by the planner.

    Attributes:
        num_slots: S - 1, slots of a group that can hold a block.
        slots_used: slots that hold a block, in the group with most of them.
        slots_pinned: slots that a known request holds, in the group with most of them.
        resident_blocks: blocks in the resident sets of known requests, mean over groups.
        total_blocks: blocks of known requests that hold tokens.
        host_blocks: logical blocks with a valid host copy.
        num_requests: known requests.
    """

    num_slots: int
    slots_used: int
    slots_pinned: int
    resident_blocks: float
    total_blocks: int
    host_blocks: int
    num_requests: int
