"""Triton kernel of `remember_shares`: programs of a fixed number share the tiles of all rows; masses are read once."""

# A Triton kernel's arguments are pointers and scalars of the traced program: Python has no types for them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# NaN is what does not equal itself.
# ruff: noqa: ANN001, ANN201, PLR0124, PLR0913, PLR0917

import torch
import triton
import triton.language as tl

from flashmemory_kernels.common import TileConfig
from flashmemory_kernels.common.due_rows import Due, padded_rows
from flashmemory_kernels.remember_shares.channels import Channels

PLACE, NUM_QUERIES, ELAPSED = (
    tl.constexpr(int(Due.PLACE)),
    tl.constexpr(int(Due.NUM_QUERIES)),
    tl.constexpr(int(Due.ELAPSED)),
)
NUM_KNOWN, NUM_BLOCKS = tl.constexpr(int(Due.NUM_KNOWN)), tl.constexpr(int(Due.NUM_BLOCKS))
FIRST_TILE, FIELDS = tl.constexpr(int(Due.FIRST_TILE)), tl.constexpr(len(Due))

# The tile is given by the masses.
CONFIG = TileConfig(tile_rows=0, programs=8, num_warps=4, num_stages=1)


@triton.jit
def combined_shares(
    p_mass, p_lse, p_groups, i_tile, i_row, age, i_group, i_column, m_block, num_layers, num_queries,
    H: tl.constexpr, H_PAD: tl.constexpr,
):  # fmt: skip
    """The largest share that a head of the group pays with one query, their mean, and the root of their mean square."""
    i_head = tl.arange(0, H_PAD)
    m_head = i_head < H
    num_heads = num_layers * H
    top = i_column.to(tl.float32) * 0.0
    total = top
    squares = top
    num_members = 0
    for i_layer in range(num_layers):
        if tl.load(p_groups + i_layer) == i_group:
            i_member = i_layer * H + i_head
            i_line = (tl.cast(i_tile, tl.int64) * num_heads + i_member) * num_queries + age
            m_mass = m_head[:, None] & m_block[None, :]
            p_shares = p_mass + i_line[:, None] * i_column.shape[0] + i_column[None, :]
            mass = tl.load(p_shares, m_mass, other=float("-inf"))
            i_lse = (tl.cast(i_row, tl.int64) * num_heads + i_member) * num_queries + age
            shares = tl.exp(mass - tl.load(p_lse + i_lse, m_head, other=float("inf"))[:, None])
            shares = tl.where(shares == shares, shares, 0.0)
            top = tl.maximum(top, tl.max(shares, axis=0))
            total += tl.sum(shares, axis=0)
            squares += tl.sum(shares * shares, axis=0)
            num_members += H
    return top, total / num_members, tl.sqrt(squares / num_members)


@triton.jit(do_not_specialize=["num_rows"])
def remember_shares_kernel(
    p_mass, p_lse, p_rows, p_groups, p_decays, p_modes, p_memory,
    num_rows, num_layers, num_queries, stride_channel, stride_group, stride_place,
    H: tl.constexpr, H_PAD: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr,
    N_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Bring tiles of one layer group up to date."""
    i_group = tl.program_id(1)
    i_channel = tl.arange(0, C_PAD)
    m_channel = i_channel < C
    decay = tl.load(p_decays + i_channel, m_channel, other=0.0)[:, None]
    mode = tl.load(p_modes + i_channel, m_channel, other=0)[:, None]
    heads_by, over_time = mode % 3, mode // 3
    i_rows = tl.arange(0, N_PAD)
    m_rows = i_rows < num_rows
    first_tiles = tl.load(p_rows + i_rows * FIELDS + FIRST_TILE, m_rows, other=2147483647)
    is_scored = m_rows & (tl.load(p_rows + i_rows * FIELDS + NUM_QUERIES, m_rows, other=0) > 0)
    row_tiles = tl.cdiv(tl.load(p_rows + i_rows * FIELDS + NUM_BLOCKS, m_rows, other=0), TILE)
    num_tiles = tl.max(tl.where(is_scored, first_tiles + row_tiles, 0), axis=0)

    for i_tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        # Rows without tiles begin where the next one does: the last one that begins here has the tile.
        i_row = tl.sum((first_tiles <= i_tile).to(tl.int32), axis=0) - 1
        p_row = p_rows + i_row * FIELDS
        i_column = tl.arange(0, TILE)
        i_block = (i_tile - tl.load(p_row + FIRST_TILE)) * TILE + i_column
        m_block = i_block < tl.load(p_row + NUM_BLOCKS)
        largest = tl.zeros((C_PAD, TILE), tl.float32)
        total = tl.zeros((C_PAD, TILE), tl.float32)
        weight = tl.full((C_PAD, 1), 1.0, tl.float32)
        for age in range(tl.load(p_row + NUM_QUERIES)):
            top, mean, rms = combined_shares(
                p_mass, p_lse, p_groups, i_tile, i_row, age, i_group, i_column, m_block,
                num_layers, num_queries, H, H_PAD,
            )  # fmt: skip
            value = tl.where(heads_by == 0, top[None, :], tl.where(heads_by == 1, mean[None, :], rms[None, :]))
            largest = tl.maximum(largest, value * weight)
            total += tl.where(over_time == 2, value * value, value) * weight
            weight *= decay
        elapsed = tl.load(p_row + ELAPSED)
        fade = tl.where(elapsed == 0, 1.0, tl.exp2(elapsed.to(tl.float32) * tl.log2(decay)))
        p_own_memory = (
            p_memory + tl.load(p_row + PLACE).to(tl.int64) * stride_place + i_group.to(tl.int64) * stride_group
        )
        p_blocks = p_own_memory + i_channel.to(tl.int64)[:, None] * stride_channel + i_block[None, :]
        m_known = m_channel[:, None] & (i_block < tl.load(p_row + NUM_KNOWN))[None, :]
        old = tl.load(p_blocks, m_known, other=0.0)
        rooted = tl.sqrt(old * old * fade + (1.0 - decay) * total)
        new = tl.where(
            over_time == 0, tl.maximum(old * fade, largest), tl.where(over_time == 1, old * fade + total, rooted)
        )
        tl.store(p_blocks, new, m_channel[:, None] & m_block[None, :])


def remember_shares_triton(
    mass: torch.Tensor,
    lse: torch.Tensor,
    rows: torch.Tensor,
    groups: torch.Tensor,
    channels: Channels,
    memory: torch.Tensor,
) -> None:
    """See `op.remember_shares`."""
    num_tiles, num_heads, num_queries, tile = mass.shape
    num_channels, num_groups, _, _ = memory.shape
    if len(rows) == 0 or num_tiles == 0:
        return
    heads = num_heads // len(groups)
    remember_shares_kernel[(CONFIG.num_programs(num_tiles, num_groups, mass.device), num_groups)](
        mass, lse, rows, groups, channels.decays, channels.modes, memory,
        len(rows), len(groups), num_queries, *memory.stride()[:3],
        H=heads, H_PAD=triton.next_power_of_2(heads), C=num_channels, C_PAD=triton.next_power_of_2(num_channels),
        N_PAD=padded_rows(len(rows)), TILE=tile,
        num_warps=CONFIG.num_warps,
    )  # fmt: skip
