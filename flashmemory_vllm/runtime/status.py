"""What a worker holds right now, as `GET /flashmemory/status` tells it. No token and no text is part of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from flashmemory_vllm.residency.modes import reason
from flashmemory_vllm.residency.planner import StepPlanner
from flashmemory_vllm.residency.requests import RequestState
from flashmemory_vllm.residency.slot_arrays import NOT_RESIDENT
from flashmemory_vllm.residency.types import IntArray, Phase
from flashmemory_vllm.runtime.history import Cycle, SelectionHistory

BlockState = Literal["evicted", "cached", "resident", "recalled", "sink", "recent"]
"""Where a block of a request is, and why:

evicted   only in the host pool
cached    has a slot until somebody needs it; decode does not read it
resident  chosen or being written, read from its slot
recalled  as resident, fetched from the host for the latest selection
sink      as resident, always chosen: one of the first blocks
recent    as resident, always chosen: one of the newest blocks
"""

DenseReason = Literal["below_min_sparse_tokens", "ratio_keeps_all", "mode_pressure", "score_share"]

_STATES: tuple[BlockState, ...] = get_args(BlockState)
_CODES = {state: code for code, state in enumerate(_STATES)}

Run = Annotated[tuple[BlockState, Annotated[int, Field(ge=1)]], Field(description="Equal blocks in a row.")]


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Memory(_Answer):
    """How full the two memories are, in blocks."""

    slots_used: int = Field(description="Slots that hold a block, in the layer group with most of them.")
    slots_pinned: int = Field(description="Slots that known requests hold, in the layer group with most of them.")
    slots_total: int = Field(description="Slots of a layer group that can hold a block.")
    host_blocks_used: int = Field(description="Logical blocks with a valid host copy, cached ones included.")
    host_blocks_total: int = Field(description="Logical blocks that the host pool holds.")


class RequestStatus(_Answer):
    """A request that the worker knows, and where its blocks are."""

    request_id: str = Field(
        description="The id that vLLM's API server gave it. A completion's is followed by the number of the prompt."
    )
    engine_request_id: str = Field(description="The id inside of vLLM's engine, unique there.")
    phase: Literal["prefill", "decode"]
    mode: Literal["sparse", "dense"] = Field(description="Whether it decodes with some or with all of its blocks.")
    reason: DenseReason | None = Field(
        description="Why it is dense. `score_share`: too large a share of its blocks was worth a slot. Null if sparse."
    )
    num_tokens: int = Field(description="Tokens that have KV.")
    prefill_tokens: int = Field(description="Tokens that dense prefill computes.")
    num_blocks: int = Field(description="Blocks that hold tokens.")
    resident_blocks: float = Field(description="Blocks in its resident set, mean over layer groups.")
    selection_step: int | None = Field(
        description="The first step that was planned with the selection its sets follow. Null: none yet."
    )
    strips: list[list[Run]] | None = Field(
        description="Per layer group the states of its blocks in order, run-length encoded. Null: not asked for."
    )


class SelectionStatus(_Answer):
    """A selection that came into force."""

    step: int = Field(description="The first step that was planned with it.")
    request_id: str = Field(description="As in `requests`, like `engine_request_id`.")
    engine_request_id: str
    first: bool = Field(description="The request had none before.")
    chosen_blocks: int = Field(description="Blocks of the set, over all layer groups.")
    changed_blocks: int = Field(
        description="Those that the selection before it had not chosen, but could have. All if it is the first."
    )
    recalled_blocks: int = Field(description="Those that had to come from the host.")
    late: bool = Field(description="A step waited for copies when some of these were due.")


class RuntimeStatus(_Answer):
    """One worker between two steps."""

    step: int = Field(description="The last step that was planned.")
    block_size: int = Field(description="Tokens of a block.")
    memory: Memory
    requests: list[RequestStatus] = Field(description="Known requests, the longest known first.")
    selections: list[SelectionStatus] = Field(description="The last selections, the newest first.")


@dataclass(frozen=True, slots=True)
class StripsAsked:
    """Whose blocks are to be told one by one, which is what takes time: some 0.4 ms for 131,072 tokens.

    Attributes:
        longest_known: how many of the requests, those that are known for longest.
        engine_request_id: one more. Empty for none.
    """

    longest_known: int = 0
    engine_request_id: str = ""

    def has(self, index: int, state: RequestState) -> bool:
        """Whether the request at a place among the known ones is asked for."""
        return index < self.longest_known or state.req_id == self.engine_request_id


def runtime_status(
    planner: StepPlanner,
    history: SelectionHistory,
    client_id: Callable[[str], str],
    strips: StripsAsked,
) -> dict[str, Any]:
    """Describe a worker's memory; call it between two steps, which wait for it.

    Args:
        planner: what is to be described.
        history: its last selections.
        client_id: from the engine's request id to the one that its client sees.
        strips: the requests whose blocks are told one by one.

    Returns:
        The fields of `RuntimeStatus` as plain data: who asked checks them, in another process.
    """
    usage = planner.usage()
    return {
        "step": history.step,
        "block_size": planner.geometry.block_size,
        "memory": {
            "slots_used": usage.slots_used,
            "slots_pinned": usage.slots_pinned,
            "slots_total": usage.num_slots,
            "host_blocks_used": usage.host_blocks,
            "host_blocks_total": planner.geometry.num_logical_blocks - 1,
        },
        "requests": [
            _request(
                state, history.cycle_of(state), planner, client_id(state.req_id), has_strips=strips.has(index, state)
            )
            for index, state in enumerate(planner.requests)
        ],
        "selections": [_selection(cycle, client_id(cycle.state.req_id)) for cycle in history],
    }


def _request(
    state: RequestState, cycle: Cycle | None, planner: StepPlanner, request_id: str, *, has_strips: bool
) -> dict[str, Any]:
    """The fields of `RequestStatus`."""
    num_blocks, held = -(-state.num_tokens // planner.geometry.block_size), planner.held_by(state)
    length, ratio = max(state.num_tokens, state.prefill_len), planner.requests.policy.resident_ratio
    why = "score_share" if state.falls_back else reason(state.policy, length, ratio)
    phase = Phase.DECODE if state.num_tokens >= state.prefill_len else Phase.PREFILL
    return {
        "request_id": request_id,
        "engine_request_id": state.req_id,
        "phase": phase.value,
        "mode": "sparse" if why == "sparse" else "dense",
        "reason": None if why == "sparse" else why,
        "num_tokens": state.num_tokens,
        "prefill_tokens": state.prefill_len,
        "num_blocks": num_blocks,
        "resident_blocks": sum(positions.size for positions in held) / len(held),
        "selection_step": None if cycle is None else cycle.step,
        "strips": [
            run_lengths(_codes(state, positions, planner.lut[group], None if cycle is None else cycle.recalled[group]))
            for group, positions in enumerate(held)
        ]
        if has_strips
        else None,
    }


def _selection(cycle: Cycle, request_id: str) -> dict[str, Any]:
    """The fields of `SelectionStatus`."""
    return {
        "step": cycle.step,
        "request_id": request_id,
        "engine_request_id": cycle.state.req_id,
        "first": cycle.first,
        "chosen_blocks": sum(positions.size for positions in cycle.chosen),
        "changed_blocks": cycle.num_changed,
        "recalled_blocks": sum(positions.size for positions in cycle.recalled),
        "late": cycle.late,
    }


def _codes(state: RequestState, held: IntArray, lut: IntArray, recalled: IntArray | None) -> IntArray:
    """int32 `[num_blocks]` index into the states of each block of a request in a layer group.

    Args:
        state: the request.
        held: positions of the blocks that it holds.
        lut: slot of each logical block.
        recalled: positions of those that were fetched for its latest selection, if it has one.
    """
    num_blocks = -(-state.num_tokens // state.policy.block_size)
    has_slot = lut[state.blocks.ids[:num_blocks]] != NOT_RESIDENT
    codes = np.where(has_slot, _CODES["cached"], _CODES["evicted"]).astype(np.int32)
    is_held = np.zeros(num_blocks, np.bool_)
    is_held[held] = True
    codes[is_held] = _CODES["resident"]
    if recalled is not None:
        codes[recalled[is_held[recalled]]] = _CODES["recalled"]
    if state.has_set:
        sink, recent = state.policy.sink_blocks(state.num_tokens), state.policy.recent_blocks(state.num_tokens)
        codes[:sink][is_held[:sink]] = _CODES["sink"]
        codes[-recent:][is_held[-recent:]] = _CODES["recent"]
    return codes


def run_lengths(codes: IntArray) -> list[Run]:
    """Equal neighbours as one.

    Args:
        codes: int32 `[n]` indices into the states.

    Returns:
        State and count of each run, in order; none for no block.
    """
    if not codes.size:
        return []
    starts = np.concatenate(([0], np.flatnonzero(np.diff(codes)) + 1))
    counts = np.diff(starts, append=codes.size)
    return [(_STATES[code], count) for code, count in zip(codes[starts].tolist(), counts.tolist(), strict=True)]
