"""The invariants between requests and slots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.books import Books
from flashmemory_vllm.residency.budget import cdiv
from flashmemory_vllm.residency.entries import Entries
from flashmemory_vllm.residency.registry import RequestRegistry
from flashmemory_vllm.residency.requests import RequestState
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import BoolArray, IntArray


def check_requests(known: RequestRegistry, slots: SlotTable, books: Books, unwritten: IntArray) -> None:
    """Check pins, content and resident sets of all known requests; costs a pass over all their blocks.

    Args:
        known: the known requests.
        slots: where their blocks are.
        books: the tables of those that decode.
        unwritten: blocks that the open plan fills and writes back.

    Raises:
        IntegrityError: with the request or group and the numbers that do not add up.
    """
    states = list(known)
    num_blocks = sum(cdiv(state.num_tokens, state.policy.block_size) for state in states)
    if num_blocks != known.num_blocks:
        raise IntegrityError(f"requests have {num_blocks} blocks with tokens, {known.num_blocks} are counted")
    _check_extras(states, slots.pins.shape[1] - 1)
    books.check_integrity()
    pins = books.pins()
    is_unwritten = np.zeros_like(slots.host_valid)
    is_unwritten[unwritten] = True
    in_books = {place for entries in books.groups for place in np.flatnonzero(entries.count).tolist()}
    if in_books != {state.place for state in states if state.is_decoding}:
        raise IntegrityError(f"places {in_books} have tables, but not all of them or others have requests that decode")
    for state in states:
        _check_content(state, slots, books, is_unwritten[state.blocks.ids])
        for group, held in enumerate(state.held):
            pins[group, slots.lut[group, state.blocks.ids[held]]] += 1
        if state.is_decoding:
            for group, entries in enumerate(books.groups):
                _check_set(state, group, entries)
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
        if state.falls_back and not (state.is_decoding and state.num_selections):
            raise IntegrityError(f"request {state.req_id}: falls back without a set of its own to go back to")


def _check_content(state: RequestState, slots: SlotTable, books: Books, is_unwritten: BoolArray) -> None:
    """Full blocks have a host copy or are about to; a partial one is held in every group and has none."""
    num_full, rest = divmod(state.num_tokens, state.policy.block_size)
    ids = state.blocks.ids
    lost = ~slots.host_valid[ids[:num_full]] & ~is_unwritten[:num_full]
    if lost.any():
        raise IntegrityError(f"request {state.req_id}: full blocks {ids[:num_full][lost]} have no host copy")
    if rest and slots.host_valid[ids[num_full]]:
        raise IntegrityError(f"request {state.req_id}: block {ids[num_full]} is partial but has a host copy")
    for group, entries in enumerate(books.groups):
        held = entries.positions_of(state.place) if state.is_decoding else state.held[group]
        if (slots.lut[group, ids[held]] < 0).any():
            raise IntegrityError(f"request {state.req_id} group {group}: held blocks without a slot")
        if rest and num_full not in held:
            raise IntegrityError(f"request {state.req_id} group {group}: partial block {ids[num_full]} is not held")
        if state.is_decoding and (books.ids[state.place, held] != ids[held]).any():
            raise IntegrityError(f"request {state.req_id}: its table is of other blocks")


def _check_set(state: RequestState, group: int, entries: Entries) -> None:
    """A table is within its budget, but for what a fallback reads beside it, and has sink and recent blocks."""
    policy = state.policy
    where, held = f"request {state.req_id} group {group}", entries.positions_of(state.place)
    num_blocks = cdiv(state.num_tokens, policy.block_size)
    budget = policy.most_held(state.num_tokens)
    if held[-1] != num_blocks - 1:
        raise IntegrityError(f"{where}: a table up to block {held[-1]}, allowed is up to {num_blocks - 1}")
    recent = policy.recent_blocks(state.num_tokens)
    forced = np.union1d(np.arange(policy.sink_blocks(state.num_tokens)), np.arange(num_blocks - recent, num_blocks))
    if not np.isin(forced, held).all() or entries.recent[state.place] < recent:
        raise IntegrityError(f"{where}: sink or recent blocks {np.setdiff1d(forced, held)} are not in the resident set")
    num_extra = int(np.count_nonzero(entries.is_extra[state.place]))
    if held.size - num_extra > budget or (num_extra and not state.falls_back):
        raise IntegrityError(
            f"{where}: {held.size} held blocks, {num_extra} of them beside the set, exceed the budget of {budget}"
        )
