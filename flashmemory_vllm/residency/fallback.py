"""Requests that keep all their blocks though their budget is smaller, in slots that nobody has reserved.

Where scores spread over many blocks, no small set holds what decode needs: the threshold fallback of FlashMemory
(arXiv 2606.09079). The scheduler is not asked and has reserved the budgets only. So a fallback is granted beside them,
and ends in the very step in which they need its slots.
"""

from __future__ import annotations

from collections.abc import Iterable

from flashmemory_vllm.residency.budget import cdiv
from flashmemory_vllm.residency.counters import Counters
from flashmemory_vllm.residency.modes import HIGH_WATERMARK, LOW_WATERMARK
from flashmemory_vllm.residency.requests import RequestState


class DenseFallback:
    """Decides which requests fall back to all their blocks, and which give them up again.

    A request falls back with a selection, the second at the earliest, once its selected share is above the limit and
    there is room: beside the reserves of all requests up to the high watermark of `residency/modes.py`, or only up to
    the low one after it had to give up, so that it does not come and go. It stays so whatever later selections say,
    until it ends or the budgets need its slots.

    Args:
        limit: selected share above which a request falls back.
        num_slots: S, the null slot included.
        known: the known requests, live.
        counters: take what is decided.
    """

    def __init__(self, limit: float, num_slots: int, known: Iterable[RequestState], counters: Counters) -> None:
        self._limit = limit
        self._capacity = num_slots - 1
        self._known = known
        self._counters = counters

    def learn(self, state: RequestState, num_worth: int, num_evictable: int) -> None:
        """Count what a selection finds worth a slot, and let the request fall back.

        Args:
            state: a request that is selected for.
            num_worth: blocks that are worth a slot, over all groups.
            num_evictable: all of these, which its budget does not have room for in any case.
        """
        is_first = not state.num_selections
        state.num_selections += 1
        state.num_worth += num_worth
        state.num_evictable += num_evictable
        if state.falls_back or is_first or state.selected_share <= self._limit:
            return
        if self._has_room(state):
            state.falls_back = True
            self._counters.fallbacks += 1
        else:
            self._counters.refused_fallbacks += 1

    def revoke(self) -> list[RequestState]:
        """End the fallbacks for which the budgets of this step leave no room, those of the smallest share first.

        Returns:
            The requests that have to give up blocks before any slot is given out.
        """
        fallen = [state for state in self._known if state.falls_back]
        if not fallen:
            return []
        lacking = sum(state.extra_blocks + state.budget_slots for state in self._known) - self._capacity
        revoked = []
        for state in sorted(fallen, key=lambda state: state.selected_share):
            if lacking <= 0:
                break
            lacking -= state.extra_blocks
            state.falls_back, state.was_revoked = False, True
            revoked.append(state)
        self._counters.revoked_fallbacks += len(revoked)
        return revoked

    def _has_room(self, state: RequestState) -> bool:
        """Whether all blocks of the request fit beside everybody's reserve, its own growth included."""
        reserved = sum(other.policy.reserve(other.num_tokens, other.prefill_len) for other in self._known)
        fallen = sum(other.extra_blocks for other in self._known)
        policy = state.policy
        grown = max(state.num_tokens, min(state.num_tokens + policy.growth_reserve_tokens, policy.max_model_len))
        extra = cdiv(grown, policy.block_size) - policy.most_held(state.num_tokens)
        watermark = LOW_WATERMARK if state.was_revoked else HIGH_WATERMARK
        return reserved + fallen + extra <= watermark * self._capacity
