"""Which decode rows are chosen for at the end of a step, and what is asked for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from flashmemory_vllm.residency.budget import cdiv
from flashmemory_vllm.residency.requests import RequestState, ScheduledRequest
from flashmemory_vllm.residency.types import Asked, IntArray


class Asking:
    """Finds the rows to choose for: at their first sparse step, then every `tau` tokens, and when they begin a block.

    The second time comes earlier, at the step of the cycle that is farthest from those of the other requests, so that
    requests which start together come due one by one. Between the two, each of a request's first decode steps may end
    with a selection that is in force in the next step. A row that only grows, or whose last list left out what was
    chosen, is chosen for by what is known of its blocks.

    Args:
        tau: tokens between two selections of a request.
        opening_steps: first decode steps of a request that each end with a selection of their own.
        max_fetches: most blocks that come into the sets of a step's rows in a group, but for those in force at once.
        known: all known requests, live.
        epoch: int32 `[P]` tenants that each place has had, live.
    """

    def __init__(
        self, tau: int, opening_steps: int, max_fetches: int, known: Iterable[RequestState], epoch: IntArray
    ) -> None:
        self._tau = tau
        self._opening_steps = opening_steps
        self._max_fetches = max_fetches
        self._known = known
        self._epoch = epoch

    def asked(self, rows: Sequence[ScheduledRequest]) -> tuple[Asked, ...]:
        """The rows of a step to choose for. Counts the step for each: call it once a step."""
        asked = [one for one in map(self._ask, rows) if one is not None]
        num_fetching = sum(one.cap > 0 and not one.at_once for one in asked)
        share = max(1, self._max_fetches // max(1, num_fetching))
        return tuple(one._replace(cap=share) if one.cap and not one.at_once else one for one in asked)

    def _ask(self, row: ScheduledRequest) -> Asked | None:
        state, after = row.state, row.num_tokens_after
        if not state.is_asked:
            if after < state.prefill_len or state.policy.keeps_all(after + 1):
                return None
            state.phase = self._farthest_phase(after)
            state.is_asked, state.opening_steps = True, self._opening_steps
            # For the next step, with the block that it may begin
            return self._asked(row, after + 1, is_new=True)
        if state.opening_steps:
            state.opening_steps -= 1
            return self._asked(row, after, at_once=True)
        is_due = after % self._tau == state.phase
        begins = row.first_fresh < row.end
        if not (is_due or begins or state.lacks_chosen):
            return None
        fetches = is_due or state.lacks_chosen
        state.lacks_chosen = False
        return self._asked(row, after, is_scored=is_due, fetches=fetches)

    def _farthest_phase(self, num_tokens: int) -> int:
        """The phase of a request that has so many tokens now."""
        taken = [state.phase - state.num_tokens for state in self._known if state.is_asked]
        return (num_tokens + farthest(taken, self._tau)) % self._tau

    def _asked(
        self,
        row: ScheduledRequest,
        num_tokens: int,
        *,
        is_new: bool = False,
        at_once: bool = False,
        is_scored: bool = True,
        fetches: bool = True,
    ) -> Asked:
        """What is asked for a row that has so many tokens."""
        state, policy = row.state, row.state.policy
        end = cdiv(num_tokens, row.block_size)
        first_recent = max(0, end - policy.recent_blocks(num_tokens))
        sink_end = min(policy.sink_blocks(num_tokens), first_recent)
        return Asked(
            req_id=state.req_id,
            place=state.place,
            epoch=int(self._epoch[state.place]),
            num_tokens=row.num_tokens_after,
            prompt_len=state.prompt_len,
            # A copy: the request and its list of blocks may be gone when they are read
            block_ids=state.blocks.ids[: row.num_full].copy(),
            sink_end=sink_end,
            first_recent=first_recent,
            end=end,
            want=policy.decode_budget(num_tokens) - sink_end - (end - first_recent),
            cap=end * fetches,
            is_new=is_new,
            is_scored=is_scored,
            at_once=at_once or is_new,
        )


def farthest(taken: Iterable[int], tau: int) -> int:
    """The step of a cycle, from 1 to `tau`, that is farthest from all steps taken; the last of equal ones.

    Args:
        taken: steps, also of cycles before or after; those that are taken more often than others count only.
        tau: steps of a cycle.
    """
    counts = Counter(step % tau for step in taken)
    # A whole cycle of steps, each taken equally often, tells nothing.
    least = min(counts.values()) if len(counts) == tau else 0
    marks = sorted(step for step, count in counts.items() if count > least)
    if not marks:
        return tau
    gaps = [end - start for start, end in zip(marks, [*marks[1:], marks[0] + tau], strict=True)]
    widest = max(range(len(marks)), key=lambda index: (gaps[index], index))
    return (marks[widest] + gaps[widest] // 2 - 1) % tau + 1
