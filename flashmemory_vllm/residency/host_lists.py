"""Lists of who comes and who goes, made on the host from scores as the device makes them: see `choose_sets`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.books import Books
from flashmemory_vllm.residency.lists import HEADER, NOBODY
from flashmemory_vllm.residency.ranking import Frame, best
from flashmemory_vllm.residency.requests import RequestState
from flashmemory_vllm.residency.types import NO_SCORES, NOTHING, FloatArray, IntArray
from flashmemory_vllm.residency.worth import Worth


class Ask(NamedTuple):
    """A row that is chosen for.

    Attributes:
        place: where its tables lie.
        frame: what is not chosen.
        want: how many blocks are, beside the frame.
        cap: how many of them may be new in the set.
        is_new: the row has no set yet.
    """

    place: int
    frame: Frame
    want: int
    cap: int
    is_new: bool = False


@dataclass(slots=True, eq=False)
class _Known:
    """What is known of the blocks of a place's tenant.

    Attributes:
        epoch: which tenant that is.
        memory: float32 `[G, n]` what blocks are remembered for.
        remembered_at: tokens with KV then.
        worth: float32 `[G, n]` what that makes blocks worth.
        is_due: no list was made of this yet, or it left out blocks that were chosen.
    """

    epoch: int
    memory: FloatArray
    remembered_at: int
    worth: FloatArray
    is_due: bool = True


class HostLists:
    """Remembers scores by place, and makes lists of them.

    Args:
        books: the sets that lists follow from.
        threshold: worth from which a block is worth a slot.
        worth: how a block's worth follows from its scores.
    """

    def __init__(self, books: Books, threshold: float, worth: Worth) -> None:
        self._books = books
        self._threshold = threshold
        self._worth = worth
        self._known: dict[int, _Known] = {}

    def clear(self) -> None:
        """Forget all scores."""
        self._known.clear()

    def remember(self, state: RequestState, scores: FloatArray) -> None:
        """Learn of a selection.

        Args:
            state: the request.
            scores: float32 `[G, n]` of its first blocks.

        Raises:
            IntegrityError: the scores are of another number of groups, or of more blocks than the request has filled,
                or there is no order between them.
        """
        num_groups, num_full = len(self._books.groups), state.num_tokens // state.policy.block_size
        if scores.ndim != 2 or scores.shape[0] != num_groups or scores.shape[1] > num_full:
            raise IntegrityError(
                f"request {state.req_id}: scores of shape {scores.shape}, "
                f"allowed are {num_groups} groups of at most {num_full} blocks"
            )
        if np.isnan(scores).any():
            raise IntegrityError(f"request {state.req_id}: a score is NaN, allowed are numbers")
        known = self._of(state.place)
        before, since = (None, 0) if known is None else (known.memory, state.num_tokens - known.remembered_at)
        memory = self._worth.remember(scores.astype(np.float32), before, since)
        epoch = int(self._books.epoch[state.place])
        self._known[state.place] = _Known(epoch, memory, state.num_tokens, self._worth.of(memory))

    def is_due(self, place: int) -> bool:
        """Whether there is a selection that no list was made of, or one that left out blocks that were chosen."""
        known = self._of(place)
        return known is not None and known.is_due

    def make(self, step: int, asks: Sequence[Ask]) -> IntArray:
        """The list of a step, int32 `[n, G, 6 + 2 L]`, a row for each ask; L is as large as it has to be.

        Blocks that are newer than the scores are worth more than any other, the newest most.
        """
        chosen = [[self._choose(ask, group) for group in range(len(self._books.groups))] for ask in asks]
        longest = max((positions.size for row in chosen for *both, _ in row for positions in both), default=0)
        listed = np.full((len(asks), len(self._books.groups), HEADER + 2 * longest), NOBODY, np.int32)
        for ask, row, of_row in zip(asks, listed, chosen, strict=True):
            epoch = self._books.epoch[ask.place]
            for line, (come, go, num_worth) in zip(row, of_row, strict=True):
                line[:HEADER] = ask.place, epoch, step, come.size, go.size, num_worth
                line[HEADER : HEADER + come.size] = come
                line[HEADER + longest : HEADER + longest + go.size] = go
        return listed

    def _choose(self, ask: Ask, group: int) -> tuple[IntArray, IntArray, int]:
        """Who comes, who goes, and how many are worth a slot."""
        known, start = self._of(ask.place), ask.frame.sink_end
        scored = NO_SCORES if known is None else known.worth[group, start : ask.frame.recent_start]
        far = NOTHING if ask.is_new else np.sort(self._books.groups[group].set_of(ask.place)) - np.int32(start)
        value = np.full(ask.frame.num_candidates, np.inf, np.float32)
        value[: scored.size] = scored
        is_worth = value >= self._threshold
        value = self._worth.preferring(far, value)
        num_worth = int(np.count_nonzero(is_worth))
        num_chosen = min(ask.want, num_worth)
        come = NOTHING
        if ask.cap > 0:
            among = np.flatnonzero(is_worth).astype(np.int32)
            among = among[best(value[among], num_chosen)]
            is_far = np.zeros(value.size, np.bool_)
            is_far[far] = True
            new = among[~is_far[among]]
            come = new[best(value[new], ask.cap)]
            if known is not None:
                known.is_due = come.size < new.size or (group > 0 and known.is_due)
        num_going = max(far.size + come.size - num_chosen, 0)
        go = far[~best(value[far], far.size - num_going)]
        return come + np.int32(start), go + np.int32(start), num_worth

    def _of(self, place: int) -> _Known | None:
        known = self._known.get(place)
        return known if known is not None and known.epoch == self._books.epoch[place] else None
