"""What decode rows read: they enter the books, grow, and follow the lists of who comes and who goes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.books import Books
from flashmemory_vllm.residency.counters import Counters
from flashmemory_vllm.residency.entries import NO_ENTRY
from flashmemory_vllm.residency.fallback import DenseFallback
from flashmemory_vllm.residency.host_lists import Ask, HostLists
from flashmemory_vllm.residency.lists import COMES, WORTH, pairs_of
from flashmemory_vllm.residency.ranking import Frame
from flashmemory_vllm.residency.requests import RequestState, ScheduledRequest
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import NOTHING, IntArray


class _Change(NamedTuple):
    """A row whose tables change, or may.

    Attributes:
        row: the request in this step.
        frame: what it cannot do without.
        want: blocks that its budget has room for beside these.
        keeps_all: the budget is for all its blocks.
        is_new: it decodes for the first time.
        comes_at_once: however many blocks its list brings, all are there in this step.
    """

    row: ScheduledRequest
    frame: Frame
    want: int
    keeps_all: bool
    is_new: bool
    comes_at_once: bool

    @property
    def state(self) -> RequestState:
        """What is known of the request."""
        return self.row.state

    @property
    def recent(self) -> int:
        """How many of its newest blocks keep their order."""
        return self.frame.num_blocks - self.frame.recent_start


class DecodeRows:
    """Keeps the books of decode rows. A row that goes on in the same block has nothing to do.

    Args:
        slots: where blocks are.
        books: the tables.
        lists: makes the lists that sets follow.
        counters: take what is done.
        fallback: lets requests keep all their blocks. Default: None, it never does.
        max_fetches: most blocks that come by lists in one step and group, but for those that come at once.
    """

    def __init__(
        self,
        slots: SlotTable,
        books: Books,
        lists: HostLists,
        counters: Counters,
        fallback: DenseFallback | None,
        max_fetches: int,
    ) -> None:
        self._slots = slots
        self._books = books
        self._lists = lists
        self._counters = counters
        self._fallback = fallback
        self._max_fetches = max_fetches

    def settle(self, step: int, rows: Sequence[ScheduledRequest]) -> tuple[str, ...]:
        """Change the tables of a step's rows. Nothing takes a slot before `Books.settle`.

        Returns:
            The requests for which a selection has come into force.

        Raises:
            IntegrityError: a row writes more blocks than its budget has room for. One token, which is all that a
                decode row computes without drafts, always fits: see `BudgetPolicy.decode_budget`. Or a list does
                not follow from the sets in force.
        """
        for state in self._fallback.revoke() if self._fallback is not None else ():
            self._books.narrow(state.place)
            state.settled_until = 0
        changes = [_change_of(row) for row in rows if self._may_change(row)]
        if not changes:
            return ()
        self._grow([change for change in changes if not change.is_new])
        asking = [one for one in changes if not one.keeps_all and (one.state.is_offered or not one.is_new)]
        listed = self._lists.make(step, self._asks(asking))
        selected = [(one, of_row) for one, of_row in zip(asking, listed, strict=True) if one.state.is_offered]
        for change, of_row in selected:
            self._note_selection(change, of_row)
        self._apply(step, asking, listed)
        for change in changes:
            if not change.state.is_decoding:
                self._enter(change, [self._resident(change, group) for group in range(len(self._books.groups))])
        for change, _ in selected:
            self._judge(change)
        self._note_what_came(asking, listed)
        self._widen(changes, listed[[not one.comes_at_once for one in asking]])
        for change in changes:
            self._finish(change)
        return tuple(change.state.req_id for change, _ in selected)

    def _may_change(self, row: ScheduledRequest) -> bool:
        state = row.state
        return row.num_tokens_after > state.settled_until or state.is_offered or self._lists.is_due(state.place)

    def _grow(self, changes: Sequence[_Change]) -> None:
        """Rows begin the blocks that they write first in this step, mostly one or none."""
        if not changes:
            return
        growing, begun = changes, 0
        while growing := [one for one in growing if one.row.first_fresh + begun < one.row.end]:
            place = _ints(one.state.place for one in growing)
            position = _ints(one.row.first_fresh + begun for one in growing)
            blocks = _ints(one.row.fresh[begun] for one in growing)
            self._books.append(place, position, blocks, self._books.groups[0].recent[place] + 1)
            begun += 1
        self._books.keep_recent(_ints(one.state.place for one in changes), _ints(one.recent for one in changes))

    def _asks(self, changes: Sequence[_Change]) -> list[Ask]:
        """What a list is made for; rows that may bring blocks share the most that may come, the oldest wish first."""
        sharing = [one for one in changes if self._lists.is_due(one.state.place) and not one.comes_at_once]
        sharing.sort(key=lambda one: (one.state.is_offered, one.state.selection))
        share, more = divmod(self._max_fetches, max(1, len(sharing)))
        caps = {one.state.place: share + (index < more) for index, one in enumerate(sharing)}
        return [
            Ask(
                one.state.place,
                one.frame,
                one.want,
                one.frame.num_candidates if one.comes_at_once else caps.get(one.state.place, 0),
                one.is_new,
            )
            for one in changes
        ]

    def _apply(self, step: int, changes: Sequence[_Change], listed: IntArray) -> None:
        """Bring a list into force; rows that decode for the first time enter with theirs."""
        at_once, later = np.zeros(len(changes), np.bool_), np.zeros(len(changes), np.bool_)
        for index, (one, of_row) in enumerate(zip(changes, listed, strict=True)):
            if one.is_new:
                self._enter(one, [pairs_of(of_group[None]).come for of_group in of_row])
            else:
                at_once[index], later[index] = one.comes_at_once, not one.comes_at_once
        if at_once.any():
            self._books.apply(step, listed[at_once], at_once=True)
        if later.any():
            self._books.apply(step, listed[later])

    def _enter(self, change: _Change, chosen: Sequence[IntArray]) -> None:
        """A row decodes for the first time: with these blocks beside its frame, no longer with what it held."""
        row, state, frame, policy = change.row, change.state, change.frame, change.state.policy
        sink = np.arange(frame.sink_end, dtype=np.int32)
        recent = np.arange(frame.recent_start, frame.num_blocks, dtype=np.int32)
        ids = state.blocks.ids[: row.end]
        self._books.enter(
            state.place,
            ids,
            [np.concatenate((sink, far, recent)) for far in chosen],
            sink=policy.sink_blocks(policy.max_model_len),
            recent=change.recent,
            begun=row.end - row.first_fresh,
        )
        for group, held in enumerate(state.held):
            self._slots.unpin(group, ids[held])
            state.held[group] = NOTHING
        state.is_decoding = True

    def _resident(self, change: _Change, group: int) -> IntArray:
        """Without a selection: all blocks if the budget is for all, or the newest that have a slot."""
        candidates = np.arange(change.frame.sink_end, change.frame.recent_start, dtype=np.int32)
        if change.keeps_all:
            return candidates
        has_slot = self._slots.is_resident(group, change.state.blocks.ids[candidates])
        resident = candidates[has_slot]
        return resident[max(0, resident.size - change.want) :]

    def _widen(self, changes: Sequence[_Change], listed: IntArray) -> None:
        """Requests that fall back get what they lack, the newest first, as far as lists leave fetches."""
        left = self._max_fetches - listed[:, :, COMES].sum(0)
        falling = [one for one in changes if one.state.falls_back]
        for change in sorted(falling, key=lambda one: one.state.selection):
            lacking = []
            change.state.lacks_blocks = False
            for group, entries in enumerate(self._books.groups):
                in_table = entries.entry[change.state.place, : change.row.end] != NO_ENTRY
                absent = np.flatnonzero(~in_table).astype(np.int32)
                has_slot = self._slots.is_resident(group, change.state.blocks.ids[absent])
                num_left_out = max(0, int(np.count_nonzero(~has_slot) - max(0, left[group])))
                brought = absent[~has_slot][num_left_out:]
                left[group] -= brought.size
                change.state.lacks_blocks |= num_left_out > 0
                lacking.append(np.concatenate((absent[has_slot], brought)))
            self._books.widen(change.state.place, lacking)

    def _finish(self, change: _Change) -> None:
        state, after = change.state, change.row.num_tokens_after
        if state.kept_all and not change.keeps_all and not state.is_offered:
            self._counters.missing_selections += 1
        if state.is_offered and not change.keeps_all:
            state.is_offered = state.at_once = False
        state.kept_all = change.keeps_all
        lacks_blocks = state.falls_back and state.lacks_blocks
        state.settled_until = 0 if lacks_blocks else state.policy.same_budget_until(after)

    def _note_selection(self, change: _Change, of_row: IntArray) -> None:
        """Count what a selection found worth a slot and chose, and whether the request falls back for it.

        Args:
            change: the row.
            of_row: int32 `[G, 6 + 2 L]` of the list.
        """
        state, num_groups = change.state, len(self._books.groups)
        num_candidates = num_groups * change.frame.num_candidates
        self._counters.selections += 1
        state.selection = self._counters.selections
        if self._fallback is not None:
            self._fallback.learn(state, int(of_row[:, WORTH].sum()), num_candidates)
        if not state.falls_back:
            num_chosen = int(np.minimum(of_row[:, WORTH], change.want).sum())
            self._counters.selection_candidates += num_candidates
            self._counters.selected_blocks += num_chosen
            if state.is_selected:
                self._counters.reselected_blocks += num_chosen
                self._counters.reselected_resident_blocks += num_chosen - int(of_row[:, COMES].sum())
        state.is_selected = True

    def _judge(self, change: _Change) -> None:
        """Count what became of the blocks that came since the selection before, by what this one leaves in the set."""
        state = change.state
        for group, came in state.came if not state.falls_back else ():
            entries = self._books.groups[group]
            is_chosen = (entries.entry[state.place, came] != NO_ENTRY) & ~entries.is_extra[state.place, came]
            self._counters.judged_prefetches += came.size
            self._counters.useful_prefetches += int(np.count_nonzero(is_chosen))
        state.came = []

    def _note_what_came(self, changes: Sequence[_Change], listed: IntArray) -> None:
        for change, of_row in zip(changes, listed, strict=True):
            if not change.is_new and of_row[:, COMES].any():
                change.state.came += [(group, pairs_of(line[None]).come) for group, line in enumerate(of_row)]


def _change_of(row: ScheduledRequest) -> _Change:
    state, after = row.state, row.num_tokens_after
    policy = state.policy
    budget = policy.decode_budget(after)
    recent_start = min(row.end - policy.recent_blocks(after), row.first_written)
    frame = Frame(min(policy.sink_blocks(after), recent_start), recent_start, row.end)
    keeps_all = budget == row.end
    if frame.num_forced > budget and not keeps_all:
        raise IntegrityError(
            f"request {state.req_id}: a decode step of {row.num_tokens} tokens is given, "
            f"which with {frame.sink_end} sink blocks exceeds the budget of {budget} blocks; "
            f"allowed are {row.block_size} tokens"
        )
    comes_at_once = not state.is_decoding or (state.is_offered and state.at_once)
    return _Change(row, frame, budget - frame.num_forced, keeps_all, not state.is_decoding, comes_at_once)


def _ints(numbers: Iterable[int]) -> IntArray:
    return np.fromiter(numbers, np.int32)
