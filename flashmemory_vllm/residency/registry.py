"""The known requests, and what a scheduler step says about them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.books import Books
from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.residency.modes import Modes
from flashmemory_vllm.residency.places import Places
from flashmemory_vllm.residency.requests import RequestState, ScheduledRequest
from flashmemory_vllm.residency.slots import NULL_BLOCK, SlotTable
from flashmemory_vllm.residency.types import Geometry, IntArray, NewRequest, StepInput, joined


class RequestRegistry:
    """Keeps the state of every known request, each at a place of its own; iterates over it."""

    def __init__(self, geometry: Geometry, slots: SlotTable, books: Books, policy: BudgetPolicy) -> None:
        self._geometry = geometry
        self._slots = slots
        self._books = books
        self._places = Places(books.epoch.size)
        self._policy = policy
        self._modes = Modes(policy, geometry.num_slots)
        self._states: dict[str, RequestState] = {}

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
        self._places.clear()

    def schedule(self, step_input: StepInput) -> list[ScheduledRequest]:
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
        for running in step_input.running:
            state = self._known(running.req_id)
            if running.new_block_ids:
                allocated.append(self._append(state, running.new_block_ids))
        # The scheduler gave these ids to other tokens: whatever they held is gone.
        self._slots.drop(joined(allocated))
        computed = {new.req_id: new.num_computed_tokens for new in step_input.new}
        computed |= {running.req_id: running.num_computed_tokens for running in step_input.running}
        new_ids = {new.req_id for new in step_input.new}
        rows = []
        for req_id, num_tokens in step_input.num_scheduled_tokens.items():
            if req_id in new_ids:
                self._choose_policy(self._known(req_id), new_ids)
                new_ids.remove(req_id)
            rows.append(self._scheduled(req_id, num_tokens, computed))
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
        return self._append(state, new.block_ids)[num_hits:]

    def _append(self, state: RequestState, block_ids: Sequence[int]) -> IntArray:
        if block_ids and not NULL_BLOCK < min(block_ids) <= max(block_ids) < self._geometry.num_logical_blocks:
            raise IntegrityError(
                f"request {state.req_id}: blocks {min(block_ids)} to {max(block_ids)} are given, "
                f"allowed are {NULL_BLOCK + 1} to {self._geometry.num_logical_blocks - 1}"
            )
        start = len(state.blocks)
        state.blocks.extend(block_ids)
        return state.blocks.ids[start:]

    def _known(self, req_id: str) -> RequestState:
        state = self._states.get(req_id)
        if state is None:
            raise IntegrityError(f"request {req_id} goes on running but is not known")
        return state

    def _scheduled(self, req_id: str, num_tokens: int, computed: Mapping[str, int]) -> ScheduledRequest:
        state = self._known(req_id)
        if computed.get(req_id) != state.num_tokens:
            raise IntegrityError(
                f"request {req_id}: the step begins at token {computed.get(req_id)}, "
                f"the last one ended at {state.num_tokens}"
            )
        row = ScheduledRequest(state, state.num_tokens, num_tokens, self._geometry.block_size)
        state.num_tokens = row.num_tokens_after
        return row
