"""Has the device choose for all rows that ask, beside the model, and hands its lists to the host when they are used."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import torch
from flashmemory_kernels.common.due_rows import Due

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.indexer.base import Selector
from flashmemory_vllm.residency.budget import STEPS_TO_FORCE
from flashmemory_vllm.residency.lists import NOBODY, Chosen, pairs_of
from flashmemory_vllm.residency.types import Asked, IntArray
from flashmemory_vllm.runtime.choice import ChoiceState
from flashmemory_vllm.runtime.choice_work import ChoiceWork, PendingList
from flashmemory_vllm.runtime.parked import ParkedMemories
from flashmemory_vllm.runtime.remembering import NOT_FINITE, Remembering
from flashmemory_vllm.runtime.selector_guard import SelectorGuard
from flashmemory_vllm.runtime.side_stream import SideStream
from flashmemory_vllm.runtime.uploads import upload


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
        self._kind, self._block_size = selector.memory_kind, selector.geometry.block_size
        self.guard = SelectorGuard(selector)
        self._remembering = Remembering(self.guard, state.places, is_finite=selector.is_finite)
        self._pending: list[PendingList] = []
        self._num_selections: dict[str, int] = {}
        self._remembered_at = np.zeros(state.sizes.num_places, np.int64)
        self._parked = ParkedMemories(state)

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

    def choose(self, step: int, asked: Sequence[Asked], earlier: Mapping[str, torch.Tensor] = {}) -> None:
        """Enqueue the choice of a step, after all device work enqueued so far.

        Args:
            step: the step whose forward pass has just been enqueued; later than those before.
            asked: the rows, each of a place of its own.
            earlier: of requests without a set, queries `[q, A, Hq, D]` that they are scored with as well as with their
                newest one, those of their question, the last one last. Default: none.
        """
        if not asked:
            return
        rows = sorted(map(self._scored_if_possible, asked), key=_order)
        num_new = sum(row.is_new for row in rows)
        num_at_once = sum(row.at_once for row in rows)
        fields = self._fields(step, rows, earlier)
        spans = (fields[:num_at_once, Due.FIRST_RECENT] - fields[:num_at_once, Due.SINK_END]).astype(np.int64)
        spans *= self._state.sizes.num_groups
        fields[:num_at_once, Due.LONG_START] = np.cumsum(spans) - spans
        questions = [earlier.get(row.req_id) for row in rows[:num_new]]
        work = ChoiceWork(rows, fields, self._selections(rows), questions, int(spans.sum()))
        inputs = [one for one in questions if one is not None]
        arrival = self._side_stream.fetch(lambda: self._choose(work), *inputs)
        self._pending.append(PendingList(step, tuple(rows), num_at_once, fields, arrival, time.perf_counter()))

    def take(self, step: int) -> list[Chosen]:
        """What comes into force in a step, waited for if it has to be; what is due later is not waited for.

        Args:
            step: the one that begins; call it for each.
        """
        due, left = list[Chosen](), list[PendingList]()
        for pending in self._pending:
            is_begun = pending.is_begun or pending.step < step
            if pending.num_at_once and is_begun and not pending.is_begun:
                due.append(self._read(pending, pending.at_once))
            if pending.step + STEPS_TO_FORCE > step:
                left.append(replace(pending, is_begun=is_begun))
            elif pending.num_at_once < len(pending.asked):
                due.append(self._read(pending, pending.later))
        self._pending = left
        return due

    def _read(self, pending: PendingList, part: slice) -> Chosen:
        """A part of a list."""
        asked, (listed, failed) = pending.asked[part], self._rows_of(pending, part)
        self.guard.note_not_finite(int(np.count_nonzero(failed == NOT_FINITE)))
        is_selected = np.array([row.is_scored for row in asked]) & (failed == 0)
        seconds = time.perf_counter() - pending.asked_at
        return Chosen(pending.step, asked, listed, is_selected, part == pending.at_once, seconds)

    def _rows_of(self, pending: PendingList, part: slice) -> tuple[IntArray, IntArray]:
        return pending.read(self._side_stream.wait(pending.arrival).numpy(), part, self._state.sizes)

    def check_sets(self, place: int, epoch: int, sets: Sequence[IntArray]) -> None:
        """Check that what the host holds becomes what the device has chosen; waits for all lists.

        Args:
            place: of a request that has a set.
            epoch: which tenant that is.
            sets: per layer group int32 `[k]` positions, sink and recent ones included.

        Raises:
            IntegrityError: it does not.
        """
        held = [set(positions.tolist()) for positions in sets]
        for pending in self._pending:
            for part in (pending.later,) if pending.is_begun else (pending.at_once, pending.later):
                asked, (rows, _) = pending.asked[part], self._rows_of(pending, part)
                mine = [index for index, one in enumerate(asked) if (one.place, one.epoch) == (place, epoch)]
                for group, own in enumerate(held):
                    _, come, go = pairs_of(rows[mine, group])
                    own.difference_update(go.tolist())
                    own.update(come[come != NOBODY].tolist())
        for group, own in enumerate(held):
            chosen = torch.nonzero(self._state.places.in_set[group, place])[:, 0].tolist()
            if sorted(own) != chosen:
                raise IntegrityError(
                    f"place {place} group {group}: blocks {sorted(own)} are held once all lists are in force, "
                    f"the device has chosen {chosen}"
                )

    def park(self, req_id: str, place: int, num_blocks: int) -> None:
        """A request loses its place and will come back.

        Args:
            req_id: vLLM's request id.
            place: that it had.
            num_blocks: full blocks of it.
        """
        if not (self._kind.outlives and self._num_selections.get(req_id)):
            return
        self._side_stream.run(lambda: self._parked.park(req_id, place, num_blocks))

    def forget(self, req_ids: Collection[str]) -> None:
        """Drop what is kept for requests that ended; unknown ids are fine."""
        for req_id in req_ids:
            self._num_selections.pop(req_id, None)
            self._parked.forget(req_id)
            self.guard.forget(req_id)

    def warm_up(self, earlier: torch.Tensor) -> None:
        """Choose from the null block for a request that does not exist, the first time and again.

        Args:
            earlier: [q, A, Hq, D], its question.
        """
        null = Asked("", 0, NOBODY, self._block_size, 1, np.zeros(1, np.int32), 0, 1, 1, 1, 1)
        for step, is_new in enumerate((True, False)):
            self.choose(step, [null._replace(is_new=is_new, at_once=is_new)], {"": earlier} if is_new else {})
        self.take(1 + STEPS_TO_FORCE)
        self.forget([""])

    def reset(self) -> None:
        """Forget every request, and every list on its way."""
        self.forget([*self._num_selections])
        self._pending = []

    def _scored_if_possible(self, row: Asked) -> Asked:
        if row.is_scored and self.guard.lacks_keys(row.block_ids):
            return row._replace(is_scored=False, at_once=row.is_new)
        return row

    def _selections(self, rows: Sequence[Asked]) -> IntArray:
        """Selections each of the rows had before; counts these."""
        before = np.array([self._num_selections.get(row.req_id, 0) for row in rows], np.int32)
        for row in rows:
            if row.is_scored:
                self._num_selections[row.req_id] = self._num_selections.get(row.req_id, 0) + 1
        return before

    def _fields(self, step: int, rows: Sequence[Asked], earlier: Mapping[str, torch.Tensor]) -> IntArray:
        """Rows int32 `[n, len(Due)]` as the device reads them, but for what it has to look up."""
        fields = np.zeros((len(rows), len(Due)), np.int32)
        most = self._state.places.queries.shape[2] - 1
        for row, of_row in zip(rows, fields, strict=True):
            elapsed = 0 if row.is_new else row.num_tokens - int(self._remembered_at[row.place])
            newest = self._kind.num_queries or min(elapsed, most)
            if row.is_new:
                newest = 1 + len(earlier.get(row.req_id, ()))
            if row.is_scored or row.is_new:
                self._remembered_at[row.place] = row.num_tokens
            goes_on = not row.is_new or row.req_id in self._parked
            cap = row.end if row.at_once else row.cap
            of_row[:] = (
                row.place, row.epoch, step, row.is_new, row.num_tokens - 1, max(1, newest) if row.is_scored else 0,
                elapsed, -int(goes_on), row.block_ids.size, 0, row.sink_end, row.first_recent, row.end, row.want, cap,
                NOBODY,
            )  # fmt: skip
        return fields

    def _choose(self, work: ChoiceWork) -> torch.Tensor:
        """Do the work of a step; int32, what `ChoiceState.choose` returns and the long list behind it."""
        state, device, failed = self._state, self._state.known.device, None
        for row in work.rows[: work.num_new]:
            self._parked.bring_back(row.req_id, row.place)
        work.fill_tiles()
        # A copy: on a CPU it is the same memory, and is filled in
        rows, told = (upload(array.copy(), device) for array in (work.fields, work.told))
        state.look_up(rows)
        for part, due in work.due(rows, told):
            questions, remembering = work.questions[part], self._remembering
            of_part = remembering.enter(due, questions) if due.is_entering else remembering.go_on(due)
            if of_part is not None:
                failed = torch.zeros(len(rows), dtype=torch.int32, device=device) if failed is None else failed
                failed[part] = of_part
        long_list = torch.empty(work.long_size, dtype=torch.int32, device=device)
        out = state.choose(rows, failed, long_list)
        # On a CPU nobody makes another copy
        return torch.cat((out, long_list)) if work.long_size or device.type == "cpu" else out


def _order(row: Asked) -> tuple[bool, bool, bool]:
    return not row.is_new, not row.is_scored, not row.at_once
