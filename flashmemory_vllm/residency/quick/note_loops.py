"""What is noted of lists, row by row: for `ListNotes`."""

from __future__ import annotations

from flashmemory_vllm.residency.quick.arrays import TableArrays
from flashmemory_vllm.residency.quick.compiled import loop
from flashmemory_vllm.residency.types import BoolArray, IntArray, LongArray

# As in `change_loops.py`, and told again for the same reason; so are columns of `Ask` and of a list
NO_ENTRY = NOBODY = -1
PLACE, EPOCH, SINK_END, FIRST_RECENT, WANT, CAP = 0, 1, 5, 6, 8, 9
COMES, GOES, WORTH, HEADER = 3, 4, 5, 6
# Of counts
SELECTIONS, CANDIDATES, CHOSEN, AGAIN, AGAIN_RESIDENT, JUDGED, USEFUL = range(7)
NUM_COUNTS = 7


@loop
def note_rows(
    rows: IntArray,
    asked: IntArray,
    is_selected: BoolArray,
    epoch: IntArray,
    selected: IntArray,
    lacks_chosen: BoolArray,
    is_asked: BoolArray,
    counts: LongArray,
) -> None:
    """As `ListNotes.selections` and `full`, of rows that have a set.

    Args:
        rows: int32 `[n, G, 6 + 2 L]`.
        asked: int32 `[n, len(Ask)]` of the same rows.
        is_selected: bool `[n]` whose blocks were scored; becomes false for tenants that are gone.
        epoch: int32 `[P]` tenants now.
        selected: int32 `[P]` the last tenants that were selected for.
        lacks_chosen: bool `[P]` places whose last list left out what was chosen.
        is_asked: bool `[P]` becomes true for places that are selected for.
        counts: int64 `[7]`, added to.
    """
    num_groups, longest = rows.shape[1], (rows.shape[2] - HEADER) // 2
    for row in range(rows.shape[0]):
        place = asked[row, PLACE]
        if epoch[place] != asked[row, EPOCH]:
            is_selected[row] = False
            continue
        num_chosen = num_come = 0
        is_full, cap = False, asked[row, CAP]
        for group in range(num_groups):
            comes = rows[row, group, COMES]
            num_come += comes
            num_chosen += min(rows[row, group, WORTH], asked[row, WANT])
            is_full = is_full or comes >= min(cap, longest) or rows[row, group, GOES] >= longest
        if cap > 0:
            lacks_chosen[place] = is_full
        if not is_selected[row]:
            continue
        counts[SELECTIONS] += 1
        counts[CANDIDATES] += num_groups * (asked[row, FIRST_RECENT] - asked[row, SINK_END])
        counts[CHOSEN] += num_chosen
        if selected[place] == asked[row, EPOCH]:
            counts[AGAIN] += num_chosen
            counts[AGAIN_RESIDENT] += num_chosen - num_come
        selected[place] = asked[row, EPOCH]
        is_asked[place] = True


@loop
def judge(
    came: IntArray,
    num: int,
    place: IntArray,
    come: IntArray,
    is_asked: BoolArray,
    table: TableArrays,
    counts: LongArray,
) -> int:
    """As `ListNotes.changes` and `Came.add`, for one layer group.

    Args:
        came: int32 `[3, m]` places, positions and tenants of what came, with room for as many as are added.
        num: how many of them there are.
        place: int32 `[n]` of changes that are in force now.
        come: int32 `[n]` who has come; -1 for nobody.
        is_asked: bool `[P]` places that are selected for.
        table: of the group.
        counts: int64 `[7]`, added to.

    Returns:
        How many there are afterwards.
    """
    kept = 0
    for index in range(num):
        own, position = came[0, index], came[1, index]
        if came[2, index] != table.epoch[own]:
            continue
        if is_asked[own]:
            counts[JUDGED] += 1
            counts[USEFUL] += table.entry[own, position] != NO_ENTRY and not table.is_extra[own, position]
        else:
            came[0, kept], came[1, kept], came[2, kept] = own, position, came[2, index]
            kept += 1
    for index in range(place.size):
        if come[index] != NOBODY:
            came[0, kept], came[1, kept], came[2, kept] = place[index], come[index], table.epoch[place[index]]
            kept += 1
    return kept
