"""The invariants between requests and slots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.budget import cdiv
from flashmemory_vllm.residency.requests import RequestState
from flashmemory_vllm.residency.resident_set import ResidentSet
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import BoolArray, IntArray


def check_requests(known: Iterable[RequestState], slots: SlotTable, unwritten: IntArray) -> None:
    """Check pins, content and resident sets of all known requests; costs a pass over all their blocks.

    Args:
        known: the known requests.
        slots: where their blocks are.
        unwritten: blocks that the open plan fills and writes back.

    Raises:
        IntegrityError: with the request or group and the numbers that do not add up.
    """
    states = list(known)
    _check_extras(states, slots.pins.shape[1] - 1)
    pins = np.zeros_like(slots.pins)
    is_unwritten = np.zeros_like(slots.host_valid)
    is_unwritten[unwritten] = True
    for state in states:
        _check_content(state, slots, state.policy.block_size, is_unwritten[state.blocks.ids])
        for group, resident in enumerate(state.sets):
            pins[group, slots.lut[group, state.blocks.ids[resident.held]]] += 1
            known = slots.lut[group, state.blocks.ids[resident.held[: resident.slots.size]]]
            if (known != resident.slots).any():
                raise IntegrityError(f"request {state.req_id} group {group}: held blocks have moved to other slots")
            if state.is_decoding:
                _check_set(state, group, resident)
    if (pins != slots.pins).any():
        group, slot = np.argwhere(pins != slots.pins)[0]
        raise IntegrityError(
            f"group {group} slot {slot}: {slots.pins[group, slot]} pins, "
            f"but {pins[group, slot]} requests hold its block"
        )


def _check_extras(states: Sequence[RequestState], capacity: int) -> None:
    """Fallbacks leave every budget its slots, and only who decodes with a set of its own falls back."""
    budgets = sum(state.budget_slots for state in states)
    extras = sum(state.extra_blocks for state in states)
    if extras and budgets + extras > capacity:
        raise IntegrityError(
            f"budgets of {budgets} slots and fallbacks of {extras} beside them exceed the {capacity} there are"
        )
    for state in states:
        if state.falls_back and (not state.is_decoding or state.scores is None):
            raise IntegrityError(f"request {state.req_id}: falls back without a set of its own to go back to")


def _check_content(state: RequestState, slots: SlotTable, block_size: int, is_unwritten: BoolArray) -> None:
    """Full blocks have a host copy or are about to; a partial one is held in every group and has none."""
    num_full, rest = divmod(state.num_tokens, block_size)
    ids = state.blocks.ids
    lost = ~slots.host_valid[ids[:num_full]] & ~is_unwritten[:num_full]
    if lost.any():
        raise IntegrityError(f"request {state.req_id}: full blocks {ids[:num_full][lost]} have no host copy")
    if rest and slots.host_valid[ids[num_full]]:
        raise IntegrityError(f"request {state.req_id}: block {ids[num_full]} is partial but has a host copy")
    for group, resident in enumerate(state.sets):
        if (slots.lut[group, ids[resident.held]] < 0).any():
            raise IntegrityError(f"request {state.req_id} group {group}: held blocks without a slot")
        if rest and num_full not in resident.held:
            raise IntegrityError(f"request {state.req_id} group {group}: partial block {ids[num_full]} is not held")


def _check_set(state: RequestState, group: int, resident: ResidentSet) -> None:
    """A set is within its budget with all that waits for it, and has sink and recent blocks that are in force."""
    policy = state.policy
    where, held = f"request {state.req_id} group {group}", resident.held
    num_blocks = cdiv(state.num_tokens, policy.block_size)
    budget = policy.decode_budget(state.num_tokens) + state.extra_blocks
    if held[-1] != num_blocks - 1 or (np.diff(held) <= 0).any():
        raise IntegrityError(f"{where}: a set up to block {held[-1]}, allowed is up to {num_blocks - 1}, ascending")
    chosen = np.concatenate((held, resident.waiting, resident.leaving))
    if np.unique(chosen).size != chosen.size:
        raise IntegrityError(f"{where}: blocks are held, waited for and leaving at once")
    forced = np.union1d(
        np.arange(policy.sink_blocks(state.num_tokens)),
        np.arange(num_blocks - policy.recent_blocks(state.num_tokens), num_blocks),
    )
    if not np.isin(forced, held).all():
        raise IntegrityError(f"{where}: sink or recent blocks {np.setdiff1d(forced, held)} are not in the resident set")
    if held.size + max(resident.waiting.size, resident.leaving.size) > budget:
        raise IntegrityError(
            f"{where}: {held.size} held and {resident.waiting.size} waiting or {resident.leaving.size} leaving blocks "
            f"exceed the budget of {budget}"
        )
