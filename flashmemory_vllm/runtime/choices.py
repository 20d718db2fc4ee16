"""Has the device choose for all rows that ask, beside the model, and hands its lists to the host when they are used."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from flashmemory_kernels.common.due_rows import Due, padded_rows

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.indexer.base import Selector
from flashmemory_vllm.residency.asked import Ask, Asked, AskedRow
from flashmemory_vllm.residency.budget import STEPS_TO_FORCE
from flashmemory_vllm.residency.lists import NOBODY, Chosen, pairs_of
from flashmemory_vllm.residency.types import IntArray
from flashmemory_vllm.runtime.choice import GOES_ON, ChoiceState
from flashmemory_vllm.runtime.choice_work import NUM_UPLOADED, ChoiceWork, PendingList
from flashmemory_vllm.runtime.parked import ParkedMemories
from flashmemory_vllm.runtime.remembering import NOT_FINITE, Remembering
from flashmemory_vllm.runtime.selection_counts import SelectionCounts
from flashmemory_vllm.runtime.selector_guard import SelectorGuard
from flashmemory_vllm.runtime.side_stream import SideStream
from flashmemory_vllm.runtime.uploads import UploadRing

if TYPE_CHECKING:
    from flashmemory_vllm.runtime.quick_choice import QuickChoice


class ChoiceQueue:
    """Scores and chooses on a stream of its own; lists are waited for when they are used.

    What a request's blocks are remembered for outlives a preemption, if the selector remembers at all.

    Args:
        selector: says what blocks are worth.
        state: memory and sets.
        side_stream: where they change.
        is_quick: most steps are prepared by a loop that is compiled. Default: False.
    """

    def __init__(
        self, selector: Selector, state: ChoiceState, side_stream: SideStream, *, is_quick: bool = False
    ) -> None:
        self._state, self._side_stream = state, side_stream
        self._kind, self._block_size = selector.memory_kind, selector.geometry.block_size
        self.guard = SelectorGuard(selector)
        self._remembering = Remembering(self.guard, state.places, is_finite=selector.is_finite)
        self._pending: list[PendingList] = []
        self._selections = SelectionCounts(state.sizes.num_places)
        self._remembered_at = np.zeros(state.sizes.num_places, np.int64)
        # Where only the device knows which rows have failed, it keeps account of what memories know
        self._is_finite = selector.is_finite
        self._known: IntArray = np.zeros(state.sizes.num_places, np.int32)
        self._parked = ParkedMemories(state)
        self._ring = UploadRing(state.sizes.max_rows * NUM_UPLOADED, state.known.device)
        self._quick = self._make_quick() if is_quick else None

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

    def choose(self, step: int, asked: Asked, earlier: Mapping[str, torch.Tensor] = {}) -> None:
        """Enqueue the choice of a step, after all device work enqueued so far.

        Args:
            step: the step whose forward pass has just been enqueued; later than those before.
            asked: the rows, each of a place of its own.
            earlier: of requests without a set, queries `[q, A, Hq, D]` that they are scored with as well as with their
                newest one, those of their question, the last one last. Default: none.
        """
        if not asked:
            return
        asked = self._scored_if_possible(asked)
        work = None if self._quick is None else self._quick.work(step, asked)
        if work is None:
            work = self._work(step, self._in_order(asked), earlier)
        inputs = [one for one in work.questions if one is not None]
        arrival = self._side_stream.fetch(lambda: self._choose(work), *inputs)
        num_at_once = int(np.count_nonzero(work.asked.at_once)) if work.packed is None else 0
        now, is_begun = time.perf_counter(), num_at_once == 0
        self._pending.append(PendingList(step, work.asked, num_at_once, work.fields, arrival, now, is_begun))

    def _work(self, step: int, asked: Asked, earlier: Mapping[str, torch.Tensor]) -> ChoiceWork:
        """What is chosen for rows in order."""
        num_new, num_at_once = int(np.count_nonzero(asked.is_new)), int(np.count_nonzero(asked.at_once))
        names = asked.req_ids[:num_new]
        questions = [earlier.get(req_id) for req_id in names]
        fields = self._fields(step, asked, questions)
        spans = asked.num_candidates[:num_at_once].astype(np.int64) * self._state.sizes.num_groups
        fields[:num_at_once, Due.LONG_START] = np.cumsum(spans) - spans
        is_scored, selections = asked.is_scored, self._selections.before(asked.place, names)
        self._selections.count(asked.place[is_scored])
        num_scored_new = int(np.count_nonzero(is_scored[:num_new]))
        num_scored = int(np.count_nonzero(is_scored)) - num_scored_new
        scored = slice(0, num_scored_new), slice(num_new, num_new + num_scored)
        return ChoiceWork(asked, fields, selections, questions, int(spans.sum()), scored)

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
                left.append(pending if pending.is_begun else replace(pending, is_begun=is_begun))
            elif pending.num_at_once < len(pending.asked):
                due.append(self._read(pending, pending.later))
        self._pending = left
        return due

    def _read(self, pending: PendingList, part: slice) -> Chosen:
        """A part of a list."""
        asked, (listed, failed) = pending.asked.take(part), self._rows_of(pending, part)
        self.guard.note_not_finite(int(np.count_nonzero(failed == NOT_FINITE)))
        is_selected = asked.is_scored & (failed == 0)
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
                asked, (rows, _) = pending.asked.take(part), self._rows_of(pending, part)
                mine = (asked.place == place) & (asked.epoch == epoch)
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
        if not (self._kind.outlives and self._selections.of(req_id)):
            return
        num_known = int(self._known[place])
        self._side_stream.run(lambda: self._parked.park(req_id, place, num_blocks, num_known))

    def forget(self, req_ids: Collection[str]) -> None:
        """Drop what is kept for requests that ended; unknown ids are fine."""
        for req_id in req_ids:
            self._selections.forget(req_id)
            self._parked.forget(req_id)
            self.guard.forget(req_id)

    def warm_up(self, earlier: torch.Tensor) -> None:
        """Choose from the null block for requests that do not exist: one, the first time and again, and then for many.

        Kernels are compiled for some numbers of rows: see `padded_rows`. No other is needed afterwards.

        Args:
            earlier: [q, A, Hq, D], its question.
        """
        null, no_block = AskedRow("", 0, NOBODY, self._block_size, 1, 1, 0, 1, 1, 1, 1), np.zeros((1, 1), np.int32)
        self.choose(0, Asked.of([null._replace(is_new=True, at_once=True)], no_block), {"": earlier})
        most, step, num_rows = self._state.sizes.max_rows, 1, 1
        while num_rows <= most:
            rows = [null._replace(place=place) for place in range(num_rows)]
            self.choose(step, Asked.of(rows, no_block))
            step, num_rows = step + 1, padded_rows(num_rows) + 1
        for begun in range(1, step + STEPS_TO_FORCE):
            self.take(begun)
        self.forget([""])

    def reset(self) -> None:
        """Forget every request, and every list on its way."""
        self.forget(self._selections.names())
        self._pending = []

    def _scored_if_possible(self, asked: Asked) -> Asked:
        """The same rows, without scores where blocks have no index keys."""
        if not self.guard.lacks_some:
            return asked
        scored = np.flatnonzero(asked.is_scored).tolist()
        lacking = [row for row in scored if self.guard.lacks_keys(asked.blocks_of(row))]
        fields = asked.fields.copy()
        fields[lacking, Ask.IS_SCORED], fields[lacking, Ask.AT_ONCE] = 0, fields[lacking, Ask.IS_NEW]
        return replace(asked, fields=fields)

    def _make_quick(self) -> QuickChoice:
        from flashmemory_vllm.runtime.choice_loops import AccountArrays
        from flashmemory_vllm.runtime.quick_choice import QuickChoice, rule_of

        account = AccountArrays(self._remembered_at, self._known, self._selections.counts)
        num_kept = self._state.places.queries.shape[2] - 1
        return QuickChoice(account, rule_of(self._kind.num_queries, num_kept, GOES_ON, is_finite=self._is_finite))

    @staticmethod
    def _in_order(asked: Asked) -> Asked:
        """Those without a set first, of both kinds those that are scored, of these those in force at once."""
        is_new, is_scored, at_once = asked.fields[:, (Ask.IS_NEW, Ask.IS_SCORED, Ask.AT_ONCE)].T
        rank = -4 * is_new - 2 * is_scored - at_once
        if (rank[1:] >= rank[:-1]).all():
            return asked
        return asked.take(np.argsort(rank, kind="stable").astype(np.int32))

    def _fields(self, step: int, asked: Asked, questions: Sequence[torch.Tensor | None]) -> IntArray:
        """Rows int32 `[n, len(Due)]` as the device reads them, but for what it may have to look up."""
        num_new, place, num_tokens = len(questions), asked.place, asked.fields[:, Ask.NUM_TOKENS]
        elapsed = num_tokens - self._remembered_at[place]
        elapsed[:num_new] = 0
        kept = self._state.places.queries.shape[2] - 1
        newest = np.full(len(asked), self._kind.num_queries) if self._kind.num_queries else np.minimum(elapsed, kept)
        newest[:num_new] = [1 if one is None else 1 + len(one) for one in questions]
        num_known, num_blocks = self._account(asked, num_new)
        is_known = asked.is_scored | asked.is_new
        self._remembered_at[place[is_known]] = num_tokens[is_known]
        fields = np.zeros((len(asked), len(Due)), np.int32)
        fields[:, Due.PLACE], fields[:, Due.EPOCH], fields[:, Due.STEP] = place, asked.epoch, step
        fields[:, Due.IS_NEW], fields[:, Due.POSITION] = asked.is_new, num_tokens - 1
        fields[:, Due.NUM_QUERIES] = np.maximum(1, newest) * asked.is_scored
        fields[:, Due.ELAPSED], fields[:, Due.NUM_KNOWN], fields[:, Due.NUM_BLOCKS] = elapsed, num_known, num_blocks
        fields[:, Due.SINK_END : Due.CAP] = asked.fields[:, Ask.SINK_END : Ask.CAP]
        fields[:, Due.CAP] = np.where(asked.at_once, asked.fields[:, Ask.END], asked.fields[:, Ask.CAP])
        fields[:, Due.LONG_START] = NOBODY
        return fields

    def _account(self, asked: Asked, num_new: int) -> tuple[IntArray, IntArray]:
        """Blocks that the memory of each row knows before the step and after it, int32 `[n]`, or what to look up."""
        names, num_full = asked.req_ids[:num_new], asked.fields[:, Ask.NUM_FULL]
        if not self._is_finite:
            goes_on = np.full(len(asked), GOES_ON, np.int32)
            goes_on[:num_new] = [GOES_ON if req_id in self._parked else 0 for req_id in names]
            return goes_on, num_full
        before = self._known[asked.place]
        before[:num_new] = [self._parked.num_known(req_id) for req_id in names]
        after = np.where(asked.is_scored, num_full, np.minimum(num_full, before))
        self._known[asked.place] = after
        return before, after

    def _choose(self, work: ChoiceWork) -> torch.Tensor:
        """Do the work of a step; int32, what `ChoiceState.choose` returns and the long list behind it."""
        state, device, failed = self._state, self._state.known.device, None
        for row in range(work.num_new):
            self._parked.bring_back(work.asked.req_ids[row], int(work.asked.place[row]))
        rows, told = work.upload(self._ring)
        if not self._is_finite:
            state.look_up(rows, work.unscored)
        for part, due in work.due(rows, told):
            questions, remembering = work.questions[part], self._remembering
            of_part = remembering.enter(due, questions) if due.is_entering else remembering.go_on(due)
            if of_part is not None:
                failed = torch.zeros(len(rows), dtype=torch.int32, device=device) if failed is None else failed
                failed[part] = of_part
                if self._is_finite:  # all of them
                    self._known[due.fields[:, Due.PLACE]] = due.fields[:, Due.NUM_KNOWN]
        long_list = torch.empty(work.long_size, dtype=torch.int32, device=device)
        out = state.choose(rows, failed, long_list)
        if not self._is_finite:
            state.keep_known(rows)
        # On a CPU nobody makes another copy
        return torch.cat((out, long_list)) if work.long_size or device.type == "cpu" else out
