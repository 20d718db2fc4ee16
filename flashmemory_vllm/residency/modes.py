"""Which policy a request follows: decided once for each admission, by scheduler and worker alike.

There is no channel from one to the other, and none is needed: both decide from what both see in the same order,
namely who is admitted, with how many tokens, and how far everybody else has come.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, Protocol

from flashmemory_vllm.residency.budget import BudgetPolicy

Reason = Literal["sparse", "below_min_sparse_tokens", "ratio_keeps_all", "mode_pressure"]

# Shares of all slots. A request that would fill more than the first is the begin of pressure, which ends as soon
# as reserves are down to the second.
HIGH_WATERMARK = 0.9
LOW_WATERMARK = 0.7


class Admitted(Protocol):
    """What counts of a running request."""

    @property
    def policy(self) -> BudgetPolicy:
        """What it was admitted with."""

    @property
    def num_tokens(self) -> int:
        """Tokens after the last step that scheduled it, or as many as reserve the same."""

    @property
    def prefill_len(self) -> int:
        """Tokens that dense prefill computes."""


class Modes:
    """Chooses between the policy as it is, and the same with every block kept.

    With the mode `always` it is the first for every request. With `pressure` a request keeps all its blocks if
    it, its reserve for growth and the reserves of all others fill no more than the high watermark. From the first
    one that does not, requests start sparse, until reserves are below the low watermark. A request that runs goes
    on as it was admitted: to turn it sparse it would have to be scored first, and the one that waits for its slots
    would have to know when.

    Args:
        policy: the configured policy.
        num_slots: S, the same in scheduler and worker.
    """

    def __init__(self, policy: BudgetPolicy, num_slots: int) -> None:
        self._sparse = policy
        self._dense = replace(policy, resident_ratio=1.0)
        self._capacity = num_slots - 1
        self._is_pressed = False

    def preview(self, prefill_len: int, admitted: Iterable[Admitted]) -> BudgetPolicy:
        """The policy of a request if it were admitted now.

        Args:
            prefill_len: tokens that dense prefill computes.
            admitted: the requests that run, the new one not among them.
        """
        if self._sparse.mode == "always":
            return self._sparse
        return self._sparse if self._presses(prefill_len, admitted) else self._dense

    def choose(self, prefill_len: int, admitted: Iterable[Admitted]) -> BudgetPolicy:
        """As `preview`, for a request that is admitted: remembers the pressure it makes or meets."""
        if self._sparse.mode == "always":
            return self._sparse
        self._is_pressed = self._presses(prefill_len, admitted)
        return self._sparse if self._is_pressed else self._dense

    def _presses(self, prefill_len: int, admitted: Iterable[Admitted]) -> bool:
        # Without requests nothing of the past counts: a worker that has forgotten all of them agrees with a scheduler.
        reserved = sum(one.policy.reserve(one.num_tokens, one.prefill_len) for one in admitted)
        if self._is_pressed and reserved > LOW_WATERMARK * self._capacity:
            return True
        return reserved + self._dense.reserve(prefill_len, prefill_len) > HIGH_WATERMARK * self._capacity


def reason(policy: BudgetPolicy, prefill_len: int, ratio: float) -> Reason:
    """Why a request is sparse or dense as it is admitted.

    Args:
        policy: the policy chosen for it.
        prefill_len: tokens that dense prefill computes.
        ratio: the configured resident ratio.
    """
    if not policy.keeps_all(prefill_len):
        return "sparse"
    if prefill_len < policy.min_sparse_tokens:
        return "below_min_sparse_tokens"
    return "ratio_keeps_all" if policy.resident_ratio == ratio else "mode_pressure"
