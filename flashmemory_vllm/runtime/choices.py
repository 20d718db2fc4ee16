"""Has the device choose for all rows that ask, beside the model, and hands its lists to the host when they are used."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from flashmemory_kernels.common.due_rows import Due, fill_first_tiles

from flashmemory_vllm.indexer.base import Selector
from flashmemory_vllm.indexer.places import DueRows
from flashmemory_vllm.indexer.shares import TILE
from flashmemory_vllm.residency.lists import NOBODY
from flashmemory_vllm.residency.types import IntArray
from flashmemory_vllm.runtime.asked import Asked, Chosen, from_long_list
from flashmemory_vllm.runtime.choice import ChoiceState
from flashmemory_vllm.runtime.remembering import NOT_FINITE, Remembering
from flashmemory_vllm.runtime.selector_guard import SelectorGuard
from flashmemory_vllm.runtime.side_stream import Arrival, SideStream
from flashmemory_vllm.runtime.uploads import upload


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    """A list on its way: `num_new` rows without a set, then others in force at once, then all others."""

    step: int
    num_new: int
    num_at_once: int
    fields: IntArray
    arrival: Arrival


@dataclass(frozen=True, slots=True, eq=False)
class _Parked:
    """The memory of a request that lost its place: float32 `[C, G, n]`, and int32 `[1]` how many of them it knows."""

    memory: torch.Tensor
    known: torch.Tensor


class ChoiceQueue:
    """Scores and chooses on a stream of its own; lists are waited for when they are used.

    What a request's blocks are remembered for outlives a preemption, if the selector remembers at all.

    Args:
        selector: says what blocks are worth.
        state: memory and sets.
        side_stream: where they change.
    """

    def __init__(self, selector: Selector, state: ChoiceState, side_stream: SideStream) -> None:
        self._state, self._side_stream = state, side_stream
        self._kind = selector.memory_kind
        self.guard = SelectorGuard(selector)
        self._remembering = Remembering(self.guard, state.places, is_finite=selector.is_finite)
        self._pending: list[_Pending] = []
        self._num_selections: dict[str, int] = {}
        self._remembered_at = np.zeros(state.sizes.num_places, np.int64)
        self._parked: dict[str, _Parked] = {}

    @property
    def failures(self) -> Mapping[str, int]:
        """Selections that failed, by reason."""
        return self.guard.failures

    @property
    def stall_seconds(self) -> float:
        """Time in which the host waited for a list, and the device had nothing else to do."""
        return self._side_stream.stall_seconds

    def strict(self) -> AbstractContextManager[None]:
        """Inside, what the selector raises is passed on."""
        return self.guard.strict()

    def choose(self, step: int, asked: Sequence[Asked]) -> None:
        """Enqueue the choice of a step, after all device work enqueued so far.

        Args:
            step: the step whose forward pass has just been enqueued; later than those before.
            asked: the rows, each of a place of its own.
        """
        if not asked:
            return
        rows = sorted(map(self._scored_if_possible, asked), key=_order)
        num_new = sum(row.is_new for row in rows)
        num_at_once = num_new + sum(row.at_once and not row.is_new for row in rows)
        fields = self._fields(step, rows)
        spans = (fields[:num_at_once, Due.FIRST_RECENT] - fields[:num_at_once, Due.SINK_END]).astype(np.int64)
        spans *= self._state.sizes.num_groups
        fields[:num_at_once, Due.LONG_START] = np.cumsum(spans) - spans
        work = _Work(rows, fields, self._selections(rows), num_new, int(spans.sum()))
        earlier = [row.earlier for row in rows if row.earlier is not None]
        arrival = self._side_stream.fetch(lambda: self._choose(work), *earlier)
        self._pending.append(_Pending(step, num_new, num_at_once, fields, arrival))

    def take(self, step: int, *, at_once: bool) -> Chosen | None:
        """A part of a step's list, waited for if it has to be; None if there is none.

        Args:
            step: whose list it is.
            at_once: the part that is in force in the next step; it must be taken before the other one.
        """
        pending = next((one for one in self._pending if one.step == step), None)
        if pending is None or (at_once and not pending.num_at_once):
            return None
        num_rows, sizes = len(pending.fields), self._state.sizes
        out = self._side_stream.wait(pending.arrival).numpy()
        end = num_rows * (1 + sizes.num_groups * sizes.columns)
        listed = out[num_rows:end].reshape(num_rows, sizes.num_groups, sizes.columns)
        if at_once:
            first = slice(pending.num_at_once)
            return from_long_list(pending.fields[first], pending.num_new, listed[first], out[end:])
        self.guard.note_not_finite(int(np.count_nonzero(out[:num_rows] == NOT_FINITE)))
        self._pending = [one for one in self._pending if one.step > step]
        return Chosen(listed[pending.num_at_once :], {})

    def park(self, req_id: str, place: int, num_blocks: int) -> None:
        """A request loses its place and will come back.

        Args:
            req_id: vLLM's request id.
            place: that it had.
            num_blocks: full blocks of it.
        """
        if not (self._kind.outlives and self._num_selections.get(req_id)):
            return
        memory, known = self._state.places.memory, self._state.known

        def work() -> None:
            self._parked[req_id] = _Parked(memory[:, :, place, :num_blocks].clone(), known[place : place + 1].clone())

        self._side_stream.run(work)

    def forget(self, req_ids: Collection[str]) -> None:
        """Drop what is kept for requests that ended; unknown ids are fine."""
        for req_id in req_ids:
            self._num_selections.pop(req_id, None)
            self._parked.pop(req_id, None)

    def reset(self) -> None:
        """Forget every request, and every list on its way."""
        self.forget([*self._num_selections])
        self._pending = []

    def _scored_if_possible(self, row: Asked) -> Asked:
        if row.is_scored and self.guard.lacks_keys(row.block_ids):
            return row._replace(is_scored=False, at_once=False)
        return row

    def _selections(self, rows: Sequence[Asked]) -> IntArray:
        """Selections each of the rows had before; counts these."""
        before = np.array([self._num_selections.get(row.req_id, 0) for row in rows], np.int32)
        for row in rows:
            if row.is_scored:
                self._num_selections[row.req_id] = self._num_selections.get(row.req_id, 0) + 1
        return before

    def _fields(self, step: int, rows: Sequence[Asked]) -> IntArray:
        """Rows int32 `[n, len(Due)]` as the device reads them, but for what it has to look up."""
        fields = np.zeros((len(rows), len(Due)), np.int32)
        most = self._state.places.queries.shape[2] - 1
        for row, of_row in zip(rows, fields, strict=True):
            elapsed = 0 if row.is_new else row.num_tokens - int(self._remembered_at[row.place])
            newest = row.num_queries if row.is_new else self._kind.num_queries or min(elapsed, most)
            if row.is_scored or row.is_new:
                self._remembered_at[row.place] = row.num_tokens
            goes_on = not row.is_new or row.req_id in self._parked
            cap = row.end if row.at_once or row.is_new else row.cap
            of_row[:] = (
                row.place, row.epoch, step, row.is_new, row.num_tokens - 1, max(1, newest) if row.is_scored else 0,
                elapsed, -int(goes_on), row.block_ids.size, 0, row.sink_end, row.first_recent, row.end, row.want, cap,
                NOBODY,
            )  # fmt: skip
        return fields

    def _choose(self, work: _Work) -> torch.Tensor:
        """Do the work of a step; int32, what `ChoiceState.choose` returns and the long list behind it."""
        state, num_rows = self._state, len(work.rows)
        for row in work.rows[: work.num_new]:
            self._bring_back(row)
        num_scored = sum(row.is_scored for row in work.rows[: work.num_new])
        both = ((slice(num_scored), True), (slice(work.num_new, work.end_scored), False))
        for part, _ in both:
            fill_first_tiles(torch.from_numpy(work.fields[part]), TILE)
        device = state.known.device
        rows, selections = (upload(array, device) for array in (work.fields, work.selections))
        state.look_up(rows)
        failed = None
        for part, is_entering in both:
            own = work.rows[part]
            if not own:
                continue
            due = DueRows(
                work.fields[part], rows[part], tuple(row.req_id for row in own), work.selections[part],
                selections[part], np.array([row.prompt_len for row in own], np.int32), is_entering,
            )  # fmt: skip
            of_part = self._remembering.enter(due, own) if is_entering else self._remembering.go_on(due)
            if of_part is not None:
                failed = torch.zeros(num_rows, dtype=torch.int32, device=device) if failed is None else failed
                failed[part] = of_part
        long_list = torch.empty(work.long_size, dtype=torch.int32, device=device)
        out = state.choose(rows, failed, long_list)
        # On a CPU nobody makes another copy
        return torch.cat((out, long_list)) if work.long_size or device.type == "cpu" else out

    def _bring_back(self, row: Asked) -> None:
        """Put the memory of a request that comes back to its new place."""
        parked = self._parked.pop(row.req_id, None)
        if parked is not None:
            self._state.places.memory[:, :, row.place, : parked.memory.shape[2]] = parked.memory
            self._state.known[row.place : row.place + 1] = parked.known


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """What a step chooses.

    Attributes:
        rows: those without a set first, of both kinds those that are scored first.
        fields: int32 `[n, len(Due)]` of them.
        selections: int32 `[n]` that they had before.
        num_new: rows without a set.
        long_size: elements of the long list.
    """

    rows: Sequence[Asked]
    fields: IntArray
    selections: IntArray
    num_new: int
    long_size: int

    @property
    def end_scored(self) -> int:
        """End of the rows with a set that are scored."""
        return self.num_new + sum(row.is_scored for row in self.rows[self.num_new :])


def _order(row: Asked) -> tuple[bool, bool, bool]:
    return not row.is_new, not row.is_scored, not row.at_once
