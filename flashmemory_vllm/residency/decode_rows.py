"""What decode rows read: they enter the books, grow, and follow the lists of who comes and who goes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.residency.books import Books
from flashmemory_vllm.residency.budget import cdiv
from flashmemory_vllm.residency.counters import Counters
from flashmemory_vllm.residency.entries import NO_ENTRY
from flashmemory_vllm.residency.fallback import DenseFallback
from flashmemory_vllm.residency.lists import COMES, GOES, HEADER, NOBODY, WORTH, Chosen, FirstSet
from flashmemory_vllm.residency.registry import RequestRegistry
from flashmemory_vllm.residency.requests import RequestState, ScheduledRequest
from flashmemory_vllm.residency.slots import SlotTable
from flashmemory_vllm.residency.types import NOTHING, Asked, IntArray


class DecodeRows:
    """Keeps the books of decode rows. A row that goes on in the same block has nothing to do.

    Args:
        slots: where blocks are.
        books: the tables.
        known: the known requests, live.
        counters: take what is done.
        fallback: lets requests keep all their blocks. Default: None, it never does.
        max_fetches: most blocks that one step brings to requests that fall back, in each group.
    """

    def __init__(
        self,
        slots: SlotTable,
        books: Books,
        known: RequestRegistry,
        counters: Counters,
        fallback: DenseFallback | None,
        max_fetches: int,
    ) -> None:
        self._slots = slots
        self._books = books
        self._known = known
        self._counters = counters
        self._fallback = fallback
        self._max_fetches = max_fetches

    def settle(self, step: int, rows: Sequence[ScheduledRequest], lists: Sequence[Chosen]) -> tuple[str, ...]:
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
        for row in rows:
            if row.num_tokens > 1:
                _check_room(row)
        selected = [req_id for chosen in lists for req_id in self._apply(chosen)]
        entering = [row for row in rows if not row.state.is_decoding]
        self._grow([row for row in rows if row.state.is_decoding and row.first_fresh < row.end])
        for row in entering:
            self._enter(row)
        for row in rows:
            if row.state.first_set is not None:
                selected += self._begin(step, row, is_dense=row not in entering)
        self._widen([row for row in rows if row.state.falls_back], lists)
        scheduled = {row.state.req_id for row in rows}
        return tuple(req_id for req_id in selected if req_id in scheduled)

    def _apply(self, chosen: Chosen) -> list[str]:
        """Bring a list into force; the requests that it selects for."""
        of_asked = np.array([(one.place, one.epoch, chosen.step) for one in chosen.asked], np.int32)
        if (chosen.rows[:, :, :COMES] != of_asked[:, None]).any():
            raise IntegrityError(
                f"step {chosen.step}: a list of places, tenants and steps {chosen.rows[:, 0, :COMES].tolist()}, "
                f"asked were {of_asked.tolist()}"
            )
        is_mine = of_asked[:, 1] == self._books.epoch[of_asked[:, 0]]
        num_selected = np.count_nonzero(is_mine & chosen.is_selected)
        if num_selected:
            self._counters.selection_latency_seconds.observe(np.full(num_selected, chosen.seconds))
        is_new = np.fromiter((one.is_new for one in chosen.asked), np.bool_, len(chosen.asked))
        for index in np.flatnonzero(is_new & is_mine).tolist():
            asked = chosen.asked[index]
            far = [_who_comes(line) for line in chosen.rows[index]]
            self._state_of(asked).first_set = FirstSet(asked, far, bool(chosen.is_selected[index]))
            self._note_selection(asked, chosen.rows[index], is_selected=bool(chosen.is_selected[index]))
        indices = np.flatnonzero(is_mine & ~is_new)
        if not indices.size:
            return []
        selected = [index for index in indices.tolist() if chosen.is_selected[index]]
        for index in selected:
            self._note_selection(chosen.asked[index], chosen.rows[index], is_selected=True)
        self._books.apply(chosen.step, chosen.rows[indices], at_once=chosen.at_once)
        for index in selected:
            self._judge(self._state_of(chosen.asked[index]))
        comes, longest = chosen.rows[:, :, COMES], (chosen.rows.shape[2] - HEADER) // 2
        mine = [chosen.asked[index] for index in indices.tolist()]
        caps = np.minimum([asked.cap for asked in mine], longest)
        is_full = ((comes[indices] >= caps[:, None]) | (chosen.rows[indices, :, GOES] >= longest)).any(1)
        num_coming = comes[indices].sum(1)
        for index, asked, is_left, count in zip(indices.tolist(), mine, is_full, num_coming, strict=True):
            state = self._state_of(asked)
            if count:
                state.came += [(group, _who_comes(line)) for group, line in enumerate(chosen.rows[index])]
            if asked.cap and not chosen.at_once:
                state.lacks_chosen = bool(is_left)
        return [chosen.asked[index].req_id for index in selected]

    def _state_of(self, asked: Asked) -> RequestState:
        state = self._known.get(asked.req_id)
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

    def _grow(self, rows: Sequence[ScheduledRequest]) -> None:
        """Rows begin the blocks that they write first in this step, mostly one or none."""
        if not rows:
            return
        growing, begun = rows, 0
        while growing := [row for row in growing if row.first_fresh + begun < row.end]:
            place = _ints(row.state.place for row in growing)
            position = _ints(row.first_fresh + begun for row in growing)
            blocks = _ints(row.fresh[begun] for row in growing)
            self._books.append(place, position, blocks, self._books.groups[0].recent[place] + 1)
            begun += 1
        recent = _ints(row.state.policy.recent_blocks(row.num_tokens_after) for row in rows)
        self._books.keep_recent(_ints(row.state.place for row in rows), recent)

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

    def _note_selection(self, asked: Asked, of_row: IntArray, *, is_selected: bool) -> None:
        """Count what a selection found worth a slot and chose, and whether the request falls back for it.

        Args:
            asked: the row.
            of_row: int32 `[G, 6 + 2 L]` of the list.
            is_selected: whether it is a selection at all.
        """
        if not is_selected:
            return
        state, num_candidates = self._state_of(asked), len(self._books.groups) * asked.num_candidates
        self._counters.selections += 1
        state.selection = self._counters.selections
        if self._fallback is not None:
            self._fallback.learn(state, int(of_row[:, WORTH].sum()), num_candidates)
        if not state.falls_back:
            num_chosen = int(np.minimum(of_row[:, WORTH], asked.want).sum())
            self._counters.selection_candidates += num_candidates
            self._counters.selected_blocks += num_chosen
            if state.is_selected:
                self._counters.reselected_blocks += num_chosen
                self._counters.reselected_resident_blocks += num_chosen - int(of_row[:, COMES].sum())
        state.is_selected = True

    def _judge(self, state: RequestState) -> None:
        """Count what became of the blocks that came since the selection before, by what this one leaves in the set."""
        for group, came in state.came if not state.falls_back else ():
            entries = self._books.groups[group]
            is_chosen = (entries.entry[state.place, came] != NO_ENTRY) & ~entries.is_extra[state.place, came]
            self._counters.judged_prefetches += came.size
            self._counters.useful_prefetches += int(np.count_nonzero(is_chosen))
        state.came = []


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


def _ints(numbers: Iterable[int]) -> IntArray:
    return np.fromiter(numbers, np.int32)
