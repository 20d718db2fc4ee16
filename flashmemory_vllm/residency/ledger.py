"""The scheduler's account of slots: who has how many reserved."""

from __future__ import annotations

from dataclasses import dataclass

from flashmemory_vllm.errors import ConfigError, IntegrityError
from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.residency.modes import Modes


@dataclass(frozen=True, slots=True)
class Reservation:
    """Slots of one request.

    Attributes:
        policy: what it was admitted with.
        num_tokens: its tokens after the step that reserved the slots.
        prefill_len: tokens that dense prefill computes.
        num_slots: slots reserved.
        until: up to how many tokens it needs and reserves as many; 0 if that is not known.
    """

    policy: BudgetPolicy
    num_tokens: int
    prefill_len: int
    num_slots: int
    until: int = 0


class SlotLedger:
    """The scheduler's account of slots: the sum of all reserves never exceeds the slots there are.

    Args:
        num_slots: S, device pages of a layer group, the null slot included.
        policy: what a request reserves, as its `mode` says.

    Raises:
        ConfigError: one request of the longest length would not fit, and would wait for ever.
    """

    def __init__(self, num_slots: int, policy: BudgetPolicy) -> None:
        if policy.worst_case() > num_slots - 1:
            raise ConfigError(
                f"num_slots: {num_slots} is given, but one request of max_model_len "
                f"{policy.max_model_len} may need {policy.worst_case()} slots and the null slot"
            )
        self._capacity = num_slots - 1
        self._modes = Modes(policy, num_slots)
        self._reservations: dict[str, Reservation] = {}
        self._reserved = 0
        self._refused = 0

    @property
    def capacity(self) -> int:
        """Slots that can be reserved: all but the null slot."""
        return self._capacity

    @property
    def reserved(self) -> int:
        """Slots reserved now."""
        return self._reserved

    @property
    def refused(self) -> int:
        """Times `can_admit` said no."""
        return self._refused

    def is_admitted(self, req_id: str) -> bool:
        """Whether the request has slots reserved."""
        return req_id in self._reservations

    def policy_of(self, req_id: str) -> BudgetPolicy:
        """What an admitted request was admitted with."""
        return self._reservations[req_id].policy

    def covers(self, req_id: str, num_tokens: int) -> bool:
        """Whether a request that decodes needs and reserves with so many tokens what it does already.

        `can_admit` would say yes then, whatever others have reserved, and `commit` would change nothing. This is asked
        for each running request in each step, and true but where the request begins a block.
        """
        mine = self._reservations.get(req_id)
        return mine is not None and mine.num_tokens <= num_tokens <= mine.until

    def can_admit(self, req_id: str, num_tokens: int, prefill_end: int) -> bool:
        """Whether the request fits; what it has reserved already counts as free.

        A request that is not admitted yet must fit with its growth, a running one only as it is now: nobody is
        preempted for growth that may never come.
        """
        mine = self._reservations.get(req_id)
        if mine is None:
            policy = self._modes.preview(prefill_end, self._reservations.values())
            fits = policy.reserve(num_tokens, prefill_end) <= self._room_beside(mine)
        else:
            fits = mine.policy.need(num_tokens, prefill_end) <= self._room_beside(mine)
        self._refused += not fits
        return fits

    def commit(self, req_id: str, num_tokens: int, prefill_end: int) -> None:
        """Reserve for the request and as much of its growth as there is room for, in place of its last reserve.

        Raises:
            IntegrityError: the request does not fit; `can_admit` was not asked or its answer not heeded.
        """
        mine = self._reservations.get(req_id)
        policy = mine.policy if mine else self._modes.choose(prefill_end, self._reservations.values())
        need, room = policy.need(num_tokens, prefill_end), self._room_beside(mine)
        if need > room:
            raise IntegrityError(
                f"request {req_id} needs {need} slots next to {self._capacity - room} of other requests, "
                f"but there are {self._capacity}"
            )
        whole = policy.reserve(num_tokens, prefill_end)
        reserve = min(room, whole)
        self._reserved = self._capacity - room + reserve
        # One that is not whole may grow in the next step; one that prefills needs another number then
        until = policy.same_until(num_tokens) if reserve == whole and num_tokens > prefill_end else 0
        self._reservations[req_id] = Reservation(policy, num_tokens, prefill_end, reserve, until)

    def release(self, req_id: str) -> None:
        """Return what the request has reserved; a request that never reserved has nothing to return."""
        mine = self._reservations.pop(req_id, None)
        if mine is not None:
            self._reserved -= mine.num_slots

    def _room_beside(self, mine: Reservation | None) -> int:
        return self._capacity - self._reserved + (mine.num_slots if mine else 0)

    def check_integrity(self) -> None:
        """Compare the total with its parts.

        Raises:
            IntegrityError: the total is not their sum, or is more than there is.
        """
        total = sum(mine.num_slots for mine in self._reservations.values())
        if total != self._reserved or total > self._capacity:
            raise IntegrityError(
                f"{self._reserved} slots are booked, {total} reserved by {len(self._reservations)} requests, "
                f"{self._capacity} exist"
            )
