"""Brings memories up to date with shares of attention: for all rows at once, in portions of bounded scratch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from flashmemory_kernels.common.due_rows import Due
from flashmemory_kernels.remember_shares import Channels, remember_shares
from flashmemory_kernels.row_lse import row_lse
from flashmemory_kernels.score_rows import OnlySets, score_rows

from flashmemory_vllm.indexer.places import DueRows, PlaceState
from flashmemory_vllm.residency.budget import cdiv
from flashmemory_vllm.residency.types import IntArray

# Blocks of one row that a program scores at a time.
TILE = 64
# Queries of a row in one pass over its keys: as many as fill the columns of a product with four heads a KV head.
PASS_QUERIES = 4
# Log-masses that are held at once, unless a single row has more: 64 MiB.
SCRATCH_ELEMS = 1 << 24


@dataclass(frozen=True, slots=True, eq=False)
class KeyIndex:
    """Index keys as `score_rows` reads them.

    Attributes:
        rows: `[A, N, Hkv, R, E]`.
        scales: of rows in fp8, float32 `[A, N, Hkv]`; None of others.
        groups: int32 `[A]`, layer group of each anchor layer.
        softmax_scale: factor on `q . k`.
        checked: numbers of queries that ops were called with: all that they get comes from one place.
    """

    rows: torch.Tensor
    scales: torch.Tensor | None
    groups: torch.Tensor
    softmax_scale: float
    checked: set[int] = field(default_factory=set)


def remember_rows(
    due: DueRows, state: PlaceState, index: KeyIndex, channels: Channels, only: OnlySets | None = None
) -> None:
    """Bring the memory of rows up to date with all queries that they name.

    Args:
        due: the rows.
        state: whose memory is changed.
        index: keys of all full blocks.
        channels: what is remembered.
        only: which blocks gain. Default: all.
    """
    most = int(due.fields[:, Due.NUM_QUERIES].max(initial=0))
    tiles = _tiles(due.fields)
    # As many in each pass, so that kernels are compiled once
    count = min(PASS_QUERIES, state.queries.shape[2])
    # The oldest queries first: what is remembered of them fades with those behind them
    for first_age in reversed(range(0, most, count)):
        rows = _pass(due.on_device, first_age, count) if most > count else due.on_device
        for start, stop, first_tile in _portions(tiles, index.rows.shape[0] * state.queries.shape[3] * count):
            own = rows[start:stop]
            if start:
                own = own.clone()
                own[:, Due.FIRST_TILE] -= first_tile
            _remember(own, int(tiles[start:stop].sum()), count, state, index, channels, only)


def only_rows(rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The same rows, int32 [n, len(Due)], where those outside of a mask, bool [n], are not scored."""
    left_out = ~mask.unsqueeze(1)
    changed = rows.clone()
    # Their tiles stay where they are, so they must have no blocks there either
    for column in (Due.NUM_QUERIES, Due.NUM_BLOCKS):
        changed[:, column : column + 1].masked_fill_(left_out, 0)
    return changed


def scratch_bytes(num_rows: int, width: int, num_heads: int) -> int:
    """Most bytes of log-masses for so many rows of so many blocks, in all heads of the anchor layers."""
    of_row = cdiv(width, TILE) * TILE * num_heads * PASS_QUERIES
    return 4 * min(num_rows * of_row, max(SCRATCH_ELEMS, of_row))


def _tiles(fields: IntArray) -> IntArray:
    is_scored = fields[:, Due.NUM_QUERIES] > 0
    tiles: IntArray = -(-fields[:, Due.NUM_BLOCKS] // TILE) * is_scored
    return tiles


def _portions(tiles: IntArray, heads: int) -> Iterator[tuple[int, int, int]]:
    """First and last row of each portion, and the tiles before it; rows without tiles belong to any."""
    most = max(1, SCRATCH_ELEMS // (TILE * heads))
    start = before = held = 0
    for row, count in enumerate(tiles.tolist()):
        if held and held + count > most:
            yield start, row, before
            start, before, held = row, before + held, 0
        held += count
    if held:
        yield start, len(tiles), before


def _pass(rows: torch.Tensor, first_age: int, count: int) -> torch.Tensor:
    """The same rows as of an earlier token: with their queries from an age on, after all that are older."""
    asked = rows[:, Due.NUM_QUERIES]
    is_oldest = asked <= first_age + count
    changed = rows.clone()
    changed[:, Due.POSITION] -= first_age
    changed[:, Due.NUM_QUERIES] = (asked - first_age).clamp(0, count)
    changed[:, Due.ELAPSED] = torch.where(is_oldest, (rows[:, Due.ELAPSED] - first_age).clamp(min=0), count)
    changed[:, Due.NUM_KNOWN] = torch.where(is_oldest, rows[:, Due.NUM_KNOWN], rows[:, Due.NUM_BLOCKS])
    return only_rows(changed, asked > first_age)


def _remember(
    rows: torch.Tensor,
    num_tiles: int,
    num_queries: int,
    state: PlaceState,
    index: KeyIndex,
    channels: Channels,
    only: OnlySets | None,
) -> None:
    heads = index.rows.shape[0] * state.queries.shape[3]
    mass = torch.empty((num_tiles, heads, num_queries, TILE), device=rows.device)
    lse = torch.empty((len(rows), heads, num_queries), device=rows.device)
    known = num_queries in index.checked
    score_rows(
        state.queries, index.rows, index.scales, state.block_ids, rows, index.softmax_scale, mass, only,
        is_checked=known,
    )  # fmt: skip
    row_lse(mass, rows, lse, is_checked=known)
    remember_shares(mass, lse, rows, index.groups, channels, state.memory, is_checked=known)
    index.checked.add(num_queries)
