"""Triton kernel of `forecast_blocks`: a program for each tile of blocks of a row and group."""

# A Triton kernel's arguments are pointers and scalars of the traced program: Python has no types for them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# NaN is what does not equal itself.
# ruff: noqa: ANN001, ANN201, PLR0124, PLR0913, PLR0917

import torch
import triton
import triton.language as tl

from flashmemory_kernels.common.due_rows import Due
from flashmemory_kernels.forecast_blocks.naive import (
    DISTANCE_SCALE,
    LEAST_SHARE,
    LOG_SCALE,
    LOGIT_SCALE,
    NEAR,
    NEIGHBOURS,
    NOT_ASKED,
    NUM_OTHERS,
    SUCCESSOR,
    Head,
)

PLACE, NUM_QUERIES, FIELDS = tl.constexpr(int(Due.PLACE)), tl.constexpr(int(Due.NUM_QUERIES)), tl.constexpr(len(Due))
NUM_KNOWN, NUM_BLOCKS = tl.constexpr(int(Due.NUM_KNOWN)), tl.constexpr(int(Due.NUM_BLOCKS))
HANDED = tl.constexpr(SUCCESSOR)
SIDES, UNASKED, LEAST = tl.constexpr(NEIGHBOURS), tl.constexpr(NOT_ASKED), tl.constexpr(LEAST_SHARE)
PER_LOG, PER_LOGIT = tl.constexpr(1 / LOG_SCALE), tl.constexpr(1 / LOGIT_SCALE)
PER_DISTANCE, CLOSE = tl.constexpr(1 / DISTANCE_SCALE), tl.constexpr(NEAR)

# Blocks of a program
TILE = 64
NUM_WARPS = 4


@triton.jit
def add_feature(hidden, straight, value, p_hidden, p_linear, i_feature, i_unit, H: tl.constexpr):
    """Add a feature [TILE] to what all units [H, TILE] and the linear part get."""
    weight = tl.load(p_hidden + i_feature * H + i_unit)
    return hidden + weight[:, None] * value[None, :], straight + tl.load(p_linear + i_feature) * value


@triton.jit
def forecast_blocks_kernel(
    p_memory, p_rows, p_hidden, p_hidden_bias, p_out, p_linear, p_bias, p_calibration, p_mix,
    block_size, stride_channel, stride_group, stride_place,
    C: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of one row and group."""
    p_row = p_rows + tl.program_id(1) * FIELDS
    num_blocks = tl.where(tl.load(p_row + NUM_QUERIES) > 0, tl.load(p_row + NUM_BLOCKS), 0)
    start = tl.program_id(0) * TILE
    if start < num_blocks:
        i_block, i_unit = start + tl.arange(0, TILE), tl.arange(0, H)
        m_block = i_block < num_blocks
        p_own = p_memory + tl.load(p_row + PLACE).to(tl.int64) * stride_place
        p_own += tl.program_id(2).to(tl.int64) * stride_group
        hidden = tl.zeros((H, TILE), tl.float32) + tl.load(p_hidden_bias + i_unit)[:, None]
        straight = tl.zeros((TILE,), tl.float32) + tl.load(p_bias)
        p_blocks = p_own + i_block
        own_mix = tl.zeros((TILE,), tl.float32)
        mix_before = tl.zeros((TILE,), tl.float32)
        for channel in tl.static_range(C):
            for side in tl.static_range(SIDES):
                i_beside = i_block + (side - 1)
                m_beside = (i_beside >= 0) & (i_beside < num_blocks)
                share = tl.load(p_blocks + (side - 1), m_beside, other=0.0)
                if side == 0:
                    mix_before += share * tl.load(p_mix + channel)
                if side == 1:
                    own_mix += share * tl.load(p_mix + channel)
                value = tl.log(share + LEAST) * PER_LOG + 1.0
                hidden, straight = add_feature(
                    hidden, straight, value, p_hidden, p_linear, side * C + channel, i_unit, H
                )
            p_blocks += stride_channel
        newest = tl.load(p_blocks, m_block, other=0.0)
        asked = tl.load(p_blocks + stride_channel, m_block, other=0.0)
        asked = tl.where(asked <= UNASKED, newest, asked)
        distance = tl.maximum(((num_blocks - i_block) * block_size).to(tl.float32), 1.0)
        is_first = (tl.load(p_row + NUM_KNOWN) == 0).to(tl.float32) + tl.zeros((TILE,), tl.float32)
        at: tl.constexpr = SIDES * C
        hidden, straight = add_feature(hidden, straight, newest * PER_LOGIT, p_hidden, p_linear, at, i_unit, H)
        hidden, straight = add_feature(hidden, straight, asked * PER_LOGIT, p_hidden, p_linear, at + 1, i_unit, H)
        far = tl.log(distance) * PER_DISTANCE
        hidden, straight = add_feature(hidden, straight, far, p_hidden, p_linear, at + 2, i_unit, H)
        near = CLOSE / (distance + CLOSE)
        hidden, straight = add_feature(hidden, straight, near, p_hidden, p_linear, at + 3, i_unit, H)
        hidden, straight = add_feature(hidden, straight, is_first, p_hidden, p_linear, at + 4, i_unit, H)
        mix = tl.log(tl.maximum(own_mix, HANDED * mix_before) + LEAST) * PER_LOG + 1.0
        hidden, straight = add_feature(hidden, straight, mix, p_hidden, p_linear, at + 5, i_unit, H)
        active = hidden / (1.0 + tl.exp(-hidden))
        logit = straight + tl.sum(active * tl.load(p_out + i_unit)[:, None], axis=0)
        logit = tl.load(p_calibration + 1) + tl.load(p_calibration) * logit
        expected = 1.0 / (1.0 + tl.exp(-logit))
        p_result = p_blocks + stride_channel + stride_channel
        tl.store(p_result, tl.where(expected == expected, expected, 0.0), m_block)


def forecast_blocks_triton(memory: torch.Tensor, rows: torch.Tensor, head: Head, block_size: int) -> None:
    """See `op.forecast_blocks`."""
    num_channels, num_groups, _, width = memory.shape
    if len(rows) == 0 or width == 0:
        return
    forecast_blocks_kernel[(triton.cdiv(width, TILE), len(rows), num_groups)](
        memory, rows, *head, block_size, *memory.stride()[:3],
        C=num_channels - NUM_OTHERS, H=len(head.out), TILE=TILE, num_warps=NUM_WARPS,
    )  # fmt: skip
