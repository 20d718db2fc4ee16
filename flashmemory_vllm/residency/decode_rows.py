"""What decode rows read: they enter the books, grow, and follow the lists of who comes and who goes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

import numpy as np

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.asked import Ask
from flashmemory_vllm.residency.books import Books
from flashmemory_vllm.residency.budget import cdiv
from flashmemory_vllm.residency.counters import Counters
from flashmemory_vllm.residency.entries import NO_ENTRY
from flashmemory_vllm.residency.fallback import DenseFallback
from flashmemory_vllm.residency.lists import COMES, HEADER, NOBODY, Chosen, FirstSet
from flashmemory_vllm.residency.noting import ListNotes
from flashmemory_vllm.residency.registry import RequestRegistry
from flashmemory_vllm.residency.requests import RequestState, ScheduledRequest, ScheduledRows
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import NOTHING, BoolArray, IntArray


class DecodeRows:
    """Keeps the books of decode rows. A row that goes on in the same block has nothing to do.

    Args:
        slots: where blocks are.
        books: the tables.
        known: the known requests, live.
        counters: take what is done.
        fallback: lets requests keep all their blocks. Default: None, it never does.
        max_fetches: most blocks that one step brings to requests that fall back, in each group.
        notes: take what lists tell.
    """

    def __init__(
        self,
        slots: SlotTable,
        books: Books,
        known: RequestRegistry,
        counters: Counters,
        fallback: DenseFallback | None,
        max_fetches: int,
        notes: ListNotes,
    ) -> None:
        self._slots = slots
        self._books = books
        self._known = known
        self._counters = counters
        self._fallback = fallback
        self._max_fetches = max_fetches
        self._notes = notes

    def settle(self, step: int, rows: ScheduledRows, lists: Sequence[Chosen]) -> tuple[str, ...]:
        """Change the tables of a step's rows. Nothing takes a slot before `Books.settle`.

        Args:
            step: its number.
            rows: those that decode.
            lists: what comes into force, in this order.

        Returns:
            The requests for which a selection has come into force.

        Raises:
            IntegrityError: a row writes more blocks than its budget has room for. One token, which is all that a
                decode row computes without drafts, always fits: see `BudgetPolicy.decode_budget`. Or a list does not
                follow from the sets in force, or a row is sparse and no set was chosen.
        """
        for state in self._fallback.revoke() if self._fallback is not None else ():
            self._books.narrow(state.place)
        for row in rows.rows_of(rows.num_tokens > 1):
            _check_room(row)
        selected = [req_id for chosen in lists for req_id in self._apply(chosen)]
        is_entering = self._books.groups[0].count[rows.place] == 0
        self._grow(rows, ~is_entering & (rows.first_fresh < rows.end))
        for row in rows.rows_of(is_entering):
            self._enter(row)
        for index, state in enumerate(rows.states):
            if state.first_set is not None:
                selected += self._begin(step, rows.row(index), is_dense=not is_entering[index])
        if self._fallback is not None:
            fallen = np.array([state.falls_back for state in rows.states], np.bool_)
            self._widen(rows.rows_of(fallen), lists)
        scheduled = {state.req_id for state in rows.states} if selected else set()
        return tuple(req_id for req_id in selected if req_id in scheduled)

    def _apply(self, chosen: Chosen) -> list[str]:
        """Bring a list into force; the requests that it selects for."""
        asked, rows, notes = chosen.asked, chosen.rows, self._notes
        if self._fallback is None and not chosen.at_once:
            changes = self._books.apply_quickly(chosen.step, rows, asked.fields)
            if changes is not None:
                return [*compress(asked.req_ids, notes.note_quickly(chosen, changes).tolist())]
        of_asked = np.empty((len(asked), 1, COMES), np.int32)
        of_asked[:, 0, :2], of_asked[:, 0, 2] = asked.fields[:, : Ask.EPOCH + 1], chosen.step
        if (rows[:, :, :COMES] != of_asked).any():
            raise IntegrityError(
                f"step {chosen.step}: a list of places, tenants and steps {rows[:, 0, :COMES].tolist()}, "
                f"asked were {of_asked[:, 0].tolist()}"
            )
        is_mine, is_new = asked.epoch == self._books.epoch[asked.place], asked.is_new
        notes.latency(chosen, int(np.count_nonzero(is_mine & chosen.is_selected)))
        is_entering = is_new & is_mine
        for index in np.flatnonzero(is_entering).tolist():
            far = [_who_comes(line) for line in rows[index]]
            is_selected = bool(chosen.is_selected[index])
            self._state_of(asked.req_ids[index]).first_set = FirstSet(asked[index], far, is_selected)
        notes.selections(chosen, is_entering & chosen.is_selected)
        is_changed = is_mine & ~is_new
        if not is_changed.any():
            return []
        is_selected = is_changed & chosen.is_selected
        notes.selections(chosen, is_selected)
        pairs = self._books.apply(chosen.step, rows[is_changed], at_once=chosen.at_once)
        notes.changes(asked.place[is_selected], pairs)
        if not chosen.at_once:
            notes.full(asked.fields[is_changed], rows[is_changed])
        return [asked.req_ids[index] for index in np.flatnonzero(is_selected).tolist()]

    def _state_of(self, req_id: str) -> RequestState:
        state = self._known.get(req_id)
        assert state is not None  # it is still the tenant of its place
        return state

    def _enter(self, row: ScheduledRequest) -> None:
        """A row decodes for the first time: with its set, or with all blocks if its budget is for all."""
        state, first, policy = row.state, row.state.first_set, row.state.policy
        if first is not None:
            sink_end, first_recent, far = first.asked.sink_end, first.asked.first_recent, first.far
        elif policy.keeps_all(row.num_tokens_after):
            sink_end, first_recent = 0, row.end - policy.recent_blocks(row.num_tokens_after)
            far = [np.arange(first_recent, dtype=np.int32)] * len(self._books.groups)
        else:
            raise IntegrityError(f"request {state.req_id}: no set was chosen for its first sparse step")
        sink, recent = np.arange(sink_end, dtype=np.int32), np.arange(first_recent, row.end, dtype=np.int32)
        self._books.enter(
            state.place,
            state.blocks.ids[: row.end],
            [np.concatenate((sink, of_group, recent)) for of_group in far],
            sink=policy.sink_blocks(policy.max_model_len),
            recent=recent.size,
            begun=row.end - row.first_fresh,
        )
        for group, held in enumerate(state.held):
            self._slots.unpin(group, state.blocks.ids[held])
            state.held[group] = NOTHING
        state.is_decoding = True

    def _begin(self, step: int, row: ScheduledRequest, *, is_dense: bool) -> list[str]:
        """A row reads its first set from this step on; its request, if it was selected for.

        Args:
            step: its number.
            row: the row.
            is_dense: it has read all its blocks so far.
        """
        state, first = row.state, row.state.first_set
        assert first is not None
        if is_dense:
            self._shrink(step, state, row.end - first.asked.first_recent, first.far)
        state.first_set, state.has_set = None, True
        self._counters.missing_selections += not first.is_selected
        return [state.req_id] if first.is_selected else []

    def _shrink(self, step: int, state: RequestState, recent: int, far: Sequence[IntArray]) -> None:
        """A row does without the blocks that were not chosen."""
        self._books.keep_recent(_ints([state.place]), _ints([recent]))
        gone = [
            np.setdiff1d(entries.set_of(state.place), chosen)
            for entries, chosen in zip(self._books.groups, far, strict=True)
        ]
        longest = max(positions.size for positions in gone)
        rows = np.full((1, len(gone), HEADER + 2 * longest), NOBODY, np.int32)
        for line, positions in zip(rows[0], gone, strict=True):
            line[:HEADER] = state.place, self._books.epoch[state.place], step, 0, positions.size, 0
            line[HEADER + longest : HEADER + longest + positions.size] = positions
        self._books.apply(step, rows, at_once=True)

    def _grow(self, rows: ScheduledRows, is_growing: BoolArray) -> None:
        """Rows begin the blocks that they write first in this step, mostly one or none."""
        if not is_growing.any():
            return
        known = self._known
        if known.policy.mode == "always" and self._books.grow_quickly(rows, known.frames.recent):
            return
        growing = rows.take(is_growing)
        for begun in range(int((growing.end - growing.first_fresh).max())):
            position = growing.first_fresh + begun
            is_begun = position < growing.end
            place, position = growing.place[is_begun], position[is_begun]
            blocks = self._books.ids[place, position]
            self._books.append(place, position, blocks, self._books.groups[0].recent[place] + 1)
        recent = self._known.frames.recent[growing.num_tokens_after]
        for index, state in enumerate(growing.states):
            if state.policy is not self._known.policy:
                recent[index] = state.policy.recent_blocks(int(growing.num_tokens_after[index]))
        self._books.keep_recent(growing.place, recent)

    def _widen(self, rows: Sequence[ScheduledRequest], lists: Sequence[Chosen]) -> None:
        """Requests that fall back get what they lack, the newest first, as far as lists leave fetches."""
        if not rows:
            return
        left = np.full(len(self._books.groups), self._max_fetches)
        for chosen in lists:
            left -= 0 if chosen.at_once else chosen.rows[:, :, COMES].sum(0)
        for row in sorted(rows, key=lambda row: row.state.selection):
            lacking = []
            for group, entries in enumerate(self._books.groups):
                in_table = entries.entry[row.state.place, : row.end] != NO_ENTRY
                absent = np.flatnonzero(~in_table).astype(np.int32)
                has_slot = self._slots.is_resident(group, row.state.blocks.ids[absent])
                num_left_out = max(0, int(np.count_nonzero(~has_slot) - max(0, left[group])))
                brought = absent[~has_slot][num_left_out:]
                left[group] -= brought.size
                lacking.append(np.concatenate((absent[has_slot], brought)))
            self._books.widen(row.state.place, lacking)


def _who_comes(line: IntArray) -> IntArray:
    """Positions int32 `[k]` that come, of one group's row of a list."""
    return line[HEADER : HEADER + line[COMES]]


def _check_room(row: ScheduledRequest) -> None:
    state, after = row.state, row.num_tokens_after
    budget, end = state.policy.decode_budget(after), cdiv(after, row.block_size)
    first_recent = min(end - state.policy.recent_blocks(after), row.first_written)
    sink_end = min(state.policy.sink_blocks(after), first_recent)
    if sink_end + end - first_recent > budget and budget < end:
        raise IntegrityError(
            f"request {state.req_id}: a decode step of {row.num_tokens} tokens is given, "
            f"which with {sink_end} sink blocks exceeds the budget of {budget} blocks; "
            f"allowed are {row.block_size} tokens"
        )


def _ints(numbers: Sequence[int]) -> IntArray:
    return np.array(numbers, np.int32)
