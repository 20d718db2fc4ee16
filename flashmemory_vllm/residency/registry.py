"""The known requests, and what a scheduler step says about them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from typing import NoReturn

import numpy as np

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.books import Books
from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.residency.modes import Modes
from flashmemory_vllm.residency.places import Places
from flashmemory_vllm.residency.requests import RequestState, ScheduledRows
from flashmemory_vllm.residency.slot_arrays import NULL_BLOCK
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import Geometry, IntArray, NewRequest, StepInput, joined


class RequestRegistry:
    """Keeps the state of every known request, each at a place of its own; iterates over it.

    Attributes:
        frames: of requests under the configured policy, by their number of tokens.
        num_blocks: blocks of all requests that hold tokens.
    """

    def __init__(self, geometry: Geometry, slots: SlotTable, books: Books, policy: BudgetPolicy) -> None:
        self._geometry = geometry
        self._slots = slots
        self._books = books
        self._places = Places(books.epoch.size)
        self._policy = policy
        self._modes = Modes(policy, geometry.num_slots)
        self._states: dict[str, RequestState] = {}
        self.num_blocks = 0
        self.frames = policy.frames(np.arange(books.ids.shape[1] * policy.block_size + 1, dtype=np.int32))

    @property
    def policy(self) -> BudgetPolicy:
        """The configured policy; a request may follow another one, see `residency/modes.py`."""
        return self._policy

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._states.values())

    def __len__(self) -> int:
        return len(self._states)

    def get(self, req_id: str) -> RequestState | None:
        """The state of a request, if it is known."""
        return self._states.get(req_id)

    def clear(self) -> None:
        """Forget all requests; their slots and tables are the caller's business."""
        self._states.clear()
        self.num_blocks = 0
        self._places.clear()

    def schedule(self, step_input: StepInput) -> ScheduledRows:
        """Forget who is gone, know who is new, and note what each scheduled request computes.

        Nothing that vLLM's scheduler may do in a step raises. It hands out blocks of the pool that it was sized with,
        never its null block; hits are whole blocks, for hashes are; a request that lost its blocks comes back as a new
        one; and no token is taken back, for there are no drafts and no KV connector.

        Raises:
            IntegrityError: the step contradicts what is known, or a prefix hit ends within a block.
        """
        for req_id in chain(step_input.finished, step_input.preempted):
            self._forget(req_id)
        # A known request that is new again gives its blocks up before anybody gets blocks.
        for new in step_input.new:
            self._forget(new.req_id)
        allocated = [self._admit(new) for new in step_input.new]
        growing = [running for running in step_input.running if running.new_block_ids]
        allocated += [self._append(self._known(running.req_id), running.new_block_ids) for running in growing]
        # The scheduler gave these ids to other tokens: whatever they held is gone.
        self._slots.drop(joined(allocated))
        computed = {new.req_id: new.num_computed_tokens for new in step_input.new}
        computed |= {running.req_id: running.num_computed_tokens for running in step_input.running}
        new_ids = {new.req_id for new in step_input.new}
        # One pass without calls: there are as many rows as requests, in every step
        states, before, places, is_prefill = list[RequestState](), list[int](), list[int](), list[bool]()
        known_states, block_size = self._states, self._geometry.block_size
        for req_id, num_tokens in step_input.num_scheduled_tokens.items():
            state = known_states.get(req_id) or self._known(req_id)
            if req_id in new_ids:
                self._choose_policy(state, new_ids)
                new_ids.remove(req_id)
            known = state.num_tokens
            if computed.get(req_id) != known or not 0 < num_tokens <= state.blocks.size * block_size - known:
                self._refuse(state, num_tokens, computed.get(req_id))
            state.num_tokens = known + num_tokens
            before.append(known)
            places.append(state.place)
            is_prefill.append(known < state.prefill_len)
            states.append(state)
        rows = ScheduledRows(
            states,
            np.array(places, np.int32),
            np.array(before, np.int32),
            np.array([*step_input.num_scheduled_tokens.values()], np.int32),
            np.array(is_prefill, np.bool_),
            block_size,
        )
        self.num_blocks += int((rows.end - rows.first_fresh).sum())
        return rows

    def _choose_policy(self, state: RequestState, undecided: Collection[str]) -> None:
        """Choose as the scheduler did, which has admitted the running requests before, and others later."""
        admitted = (other for other in self if other.req_id not in undecided)
        state.policy = self._modes.choose(state.prefill_len, admitted)

    def _forget(self, req_id: str) -> None:
        state = self._states.pop(req_id, None)
        if state is None:
            return
        ids = state.blocks.ids
        for group, held in enumerate(state.held):
            self._slots.unpin(group, ids[held])
        self._books.leave(state.place)
        self._places.leave([req_id])
        # Full blocks stay, as cache for whoever hits them; a partial one can never be hit.
        num_full, rest = divmod(state.num_tokens, self._geometry.block_size)
        self.num_blocks -= num_full + (rest > 0)
        if rest:
            self._slots.drop(ids[num_full : num_full + 1])

    def _admit(self, new: NewRequest) -> IntArray:
        num_hits, rest = divmod(new.num_computed_tokens, self._geometry.block_size)
        if rest:
            raise IntegrityError(
                f"request {new.req_id}: a prefix hit of {new.num_computed_tokens} tokens is given, "
                f"allowed are multiples of the block size {self._geometry.block_size}"
            )
        state = RequestState.begin(new, self._policy, self._geometry.num_groups, self._places.of(new.req_id))
        self._states[new.req_id] = state
        self.num_blocks += num_hits
        return self._append(state, new.block_ids)[num_hits:]

    def _append(self, state: RequestState, block_ids: Sequence[int]) -> IntArray:
        if block_ids and not NULL_BLOCK < min(block_ids) <= max(block_ids) < self._geometry.num_logical_blocks:
            raise IntegrityError(
                f"request {state.req_id}: blocks {min(block_ids)} to {max(block_ids)} are given, "
                f"allowed are {NULL_BLOCK + 1} to {self._geometry.num_logical_blocks - 1}"
            )
        start = state.blocks.size
        state.blocks.extend(block_ids)
        self._books.know_blocks(state.place, start, block_ids)
        return state.blocks.ids[start:]

    def _known(self, req_id: str) -> RequestState:
        state = self._states.get(req_id)
        if state is None:
            raise IntegrityError(f"request {req_id} goes on running but is not known")
        return state

    def _refuse(self, state: RequestState, num_tokens: int, computed: int | None) -> NoReturn:
        """Tell what is wrong with a request that computes so many tokens."""
        before, block_size = state.num_tokens, self._geometry.block_size
        if computed != before:
            raise IntegrityError(
                f"request {state.req_id}: the step begins at token {computed}, the last one ended at {before}"
            )
        raise IntegrityError(
            f"request {state.req_id}: {before} + {num_tokens} tokens do not fit "
            f"its {state.blocks.size} blocks of {block_size}, or none are scheduled"
        )
