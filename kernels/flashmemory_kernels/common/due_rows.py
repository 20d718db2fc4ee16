"""What the host says of the requests whose blocks are scored or chosen in a step: a row of int32 each, on the device.

The number of rows is fixed, so that a graph may hold the kernels that read them; those not in use are padding.
"""

from collections.abc import Mapping, Sequence
from enum import IntEnum

import torch


class Due(IntEnum):
    """Fields of a row; all but PLACE and FIRST_TILE are 0 in padding.

    Positions are of blocks within their request, unless said.

    Attributes:
        PLACE: where the request has its tables, memory and set; -1 in padding.
        EPOCH: which request of that place; handed on.
        STEP: number of the step; handed on.
        IS_NEW: 1 if the set that stands at the place is not this request's.
        POSITION: token position of its newest query.
        NUM_QUERIES: newest queries that its blocks are scored with, up to what is kept; 0 if they are not scored.
        ELAPSED: tokens since its memory was last brought up to date.
        NUM_KNOWN: blocks that its memory knows from before; 0 for a new request.
        NUM_BLOCKS: blocks that its memory knows after the step: all full ones, if they are scored.
        FIRST_TILE: tiles of the rows before; see `fill_first_tiles`.
        SINK_END: end of the sink, which is always in the set.
        FIRST_RECENT: first of the newest blocks, which are always in the set; it is chosen from those in between.
        END: blocks of the request, the one being written included.
        WANT: how many are to be chosen.
        CAP: at most so many of them may be new in the set.
        LONG_START: where in the long list its changes go; -1 for the short list.
    """

    PLACE = 0
    EPOCH = 1
    STEP = 2
    IS_NEW = 3
    POSITION = 4
    NUM_QUERIES = 5
    ELAPSED = 6
    NUM_KNOWN = 7
    NUM_BLOCKS = 8
    FIRST_TILE = 9
    SINK_END = 10
    FIRST_RECENT = 11
    END = 12
    WANT = 13
    CAP = 14
    LONG_START = 15


def make_rows(given: Sequence[Mapping[Due, int]], num_rows: int, tile: int) -> torch.Tensor:
    """Rows int32 [num_rows, len(Due)] on the CPU, those behind the given ones padding; fields that are not given are 0.

    Args:
        given: fields of the first rows.
        num_rows: as many as given, or more.
        tile: see `fill_first_tiles`.
    """
    rows = torch.zeros(num_rows, len(Due), dtype=torch.int32)
    rows[len(given) :, Due.PLACE] = -1
    for row, fields in zip(rows, given, strict=False):
        for field, value in fields.items():
            row[field] = value
    fill_first_tiles(rows, tile)
    return rows


def fill_first_tiles(rows: torch.Tensor, tile: int) -> int:
    """Say in each row how many tiles the rows before it have, as its own log-masses begin there; mutates `rows`.

    Args:
        rows: int32 [n, len(Due)].
        tile: blocks of a tile, the last dim of the log-masses.

    Returns:
        The tiles of all rows.
    """
    num_tiles = torch.where(rows[:, Due.NUM_QUERIES] > 0, -(-rows[:, Due.NUM_BLOCKS] // tile), 0)
    ends = num_tiles.cumsum(0)
    rows[:, Due.FIRST_TILE] = ends - num_tiles
    return int(ends[-1]) if len(rows) else 0


def padded_rows(num_rows: int) -> int:
    """Rows that a kernel is compiled for which looks through all of them: 16, 64, 256 and so on, so that few are."""
    padded = 16
    while padded < num_rows:
        padded *= 4
    return padded


def scored_rows(rows: torch.Tensor) -> torch.Tensor:
    """Indices int64 [m] of the rows whose blocks are scored."""
    return torch.nonzero((rows[:, Due.PLACE] >= 0) & (rows[:, Due.NUM_QUERIES] > 0))[:, 0]


def padded_mass(mass: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Log-masses of rows side by side, float32 [m, M, Q, W']; -inf for blocks and queries that a row does not have.

    Args:
        mass: float32 [tiles, M, Q, TILE].
        scored: int32 [m, len(Due)], rows that are scored.
    """
    _, num_heads, num_queries, tile = mass.shape
    num_blocks, first = scored[:, Due.NUM_BLOCKS, None], scored[:, Due.FIRST_TILE, None]
    most = -(-int(num_blocks.max()) // tile) if len(scored) else 0
    tiles = (first + torch.arange(most, device=mass.device)).clamp(max=len(mass) - 1)
    of_rows = mass[tiles.long()].permute(0, 2, 3, 1, 4).reshape(len(scored), num_heads, num_queries, most * tile)
    age = torch.arange(num_queries, device=mass.device)
    is_there = (age < scored[:, Due.NUM_QUERIES, None])[:, None, :, None]
    is_there = is_there & (torch.arange(most * tile, device=mass.device) < num_blocks)[:, None, None]
    return of_rows.masked_fill(~is_there, -torch.inf)
