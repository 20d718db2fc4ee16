"""Triton kernel of `score_chunks`: a program for each tile of blocks of a row and layer group.

fp16 holds every fp8 code, 2^8 times too small. An index head is split into two fp16 numbers for each element, after it
is divided by its largest one: together they have 22 bits, and products and sums are float32 as in the specification.

Chunks of a block stand in neighbouring lines of one product. What the last ones of a block say of the next one goes a
row down; so tiles overlap by a block, whose own logit the tile before it has.
"""

# A Triton kernel's arguments are pointers and scalars of the traced program: Python has no types for them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201, PLR0913, PLR0917

import torch
import triton
import triton.language as tl

from flashmemory_kernels.common import TileConfig
from flashmemory_kernels.common.due_rows import Due
from flashmemory_kernels.score_chunks.naive import LEAST_LOGIT, Ensemble
from flashmemory_kernels.score_rows.kernel import decode_fp8

PLACE, NUM_QUERIES = tl.constexpr(int(Due.PLACE)), tl.constexpr(int(Due.NUM_QUERIES))
NUM_BLOCKS, FIELDS = tl.constexpr(int(Due.NUM_BLOCKS)), tl.constexpr(len(Due))
LEAST = tl.constexpr(LEAST_LOGIT)

# Fewest rows, columns and terms of a product on the tensor cores.
MIN_DOT = 16
# Fewest blocks of a tile, of which one belongs to the tile before.
MIN_BLOCKS = 2

# `tile_rows` are chunks of one product.
CONFIG = TileConfig(tile_rows=128, programs=0, num_warps=4, num_stages=1)


@triton.jit
def chunk_logits(
    p_codes, p_scales, i_block, i_chunk, distance, m_line, p_heads, p_gates, bias, slope,
    stride_codes_block, stride_scales_block, stride_head,
    H: tl.constexpr, E: tl.constexpr, H_PAD: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    """Logits [LINES] of chunks in one layer for one query; a number for every line."""
    i_head, i_dim = tl.arange(0, H_PAD), tl.arange(0, E_PAD)
    m_head, m_dim = i_head < H, i_dim < E
    p_query = p_heads + i_head[None, :] * stride_head + i_dim[:, None]
    query = tl.load(p_query, m_dim[:, None] & m_head[None, :], other=0.0).to(tl.float32)
    peak = tl.max(tl.abs(query), axis=0)
    unit = query / tl.where(peak == 0.0, 1.0, peak)[None, :]
    high = unit.to(tl.float16)
    low = (unit - high.to(tl.float32)).to(tl.float16)
    gates = peak * tl.load(p_gates + i_head, m_head, other=0.0).to(tl.float32)
    p_lines = p_codes + i_block * stride_codes_block + i_chunk * E
    codes = decode_fp8(tl.load(p_lines[:, None] + i_dim[None, :], m_line[:, None] & m_dim[None, :], other=0))
    products = tl.dot(codes, high, acc=tl.dot(codes, low))  # [LINES, H_PAD]
    # Not a maximum with 0, which would hide a NaN.
    rectified = tl.where(products < 0.0, 0.0, products)
    scales = tl.load(p_scales + i_block * stride_scales_block + i_chunk, m_line, other=0.0) * 256.0
    logits = tl.sum(rectified * gates[None, :], axis=1) * scales + bias + slope * tl.log(distance)
    return tl.where(m_line & (tl.abs(logits) < float("inf")), logits, LEAST)


@triton.jit
def score_chunks_kernel(
    p_heads, p_gates, p_codes, p_scales, p_ids, p_rows, p_bias, p_slope, p_offset, p_groups, p_logits,
    stride_heads_row, stride_heads_query, stride_heads_layer, stride_heads_head,
    stride_gates_row, stride_gates_query, stride_gates_layer,
    stride_codes_layer, stride_codes_block, stride_scales_layer, stride_scales_block,
    stride_ids, stride_logits_group, stride_logits_place, num_layers,
    QUERIES: tl.constexpr, C: tl.constexpr, R: tl.constexpr, H: tl.constexpr, E: tl.constexpr,
    C_PAD: tl.constexpr, H_PAD: tl.constexpr, E_PAD: tl.constexpr, BLOCKS: tl.constexpr, IS_MEAN: tl.constexpr,
):  # fmt: skip
    """BLOCKS - 1 blocks of a row in one layer group, and the block before them."""
    i_group, i_row = tl.program_id(2), tl.program_id(1).to(tl.int64)
    p_row = p_rows + i_row * FIELDS
    num_queries = tl.minimum(tl.load(p_row + NUM_QUERIES), QUERIES)
    num_blocks = tl.where(num_queries > 0, tl.load(p_row + NUM_BLOCKS), 0)
    start = tl.program_id(0) * (BLOCKS - 1)
    if start < num_blocks:
        i_line, i_tile = tl.arange(0, BLOCKS * C_PAD), tl.arange(0, BLOCKS)
        i_position, i_chunk = start - 1 + i_line // C_PAD, i_line % C_PAD
        m_position = (i_position >= 0) & (i_position < num_blocks)
        m_line = m_position & (i_chunk < C)
        place = tl.load(p_row + PLACE).to(tl.int64)
        i_block = tl.load(p_ids + place * stride_ids + i_position, m_position, other=0).to(tl.int64)
        distance = tl.where(m_line, (num_blocks - i_position) * C - i_chunk, 1).to(tl.float32)
        # Chunk c of the last R of a block has the offset c - (C - R)
        i_offset = i_chunk - (C - R)
        m_reach = m_line & (i_offset >= 0)
        is_next = i_tile[:, None] == i_tile[None, :] + 1
        best = tl.full((BLOCKS,), float("-inf"), tl.float32)
        for i_query in range(num_queries):
            total = tl.full((BLOCKS,), 0.0 if IS_MEAN else float("-inf"), tl.float32)
            num_members = 0
            for layer in range(num_layers):
                if tl.load(p_groups + layer) == i_group:
                    i_layer, query = tl.cast(layer, tl.int64), tl.cast(i_query, tl.int64)
                    logits = chunk_logits(
                        p_codes + i_layer * stride_codes_layer, p_scales + i_layer * stride_scales_layer,
                        i_block, i_chunk, distance, m_line,
                        p_heads + i_row * stride_heads_row + query * stride_heads_query + i_layer * stride_heads_layer,
                        p_gates + i_row * stride_gates_row + query * stride_gates_query + i_layer * stride_gates_layer,
                        tl.load(p_bias + layer), tl.load(p_slope + layer),
                        stride_codes_block, stride_scales_block, stride_heads_head, H, E, H_PAD, E_PAD,
                    )  # fmt: skip
                    own = tl.max(tl.reshape(logits, (BLOCKS, C_PAD)), axis=1)
                    if R > 0:
                        offset = tl.load(p_offset + layer * R + i_offset, m_reach, other=0.0)
                        handed = tl.where(m_reach, logits + offset, LEAST)
                        of_block = tl.max(tl.reshape(handed, (BLOCKS, C_PAD)), axis=1)
                        before = tl.sum(tl.where(is_next, of_block[None, :], 0.0), axis=1)
                        # Nothing is before the first block
                        has_before = (i_tile > 0) & (start - 1 + i_tile > 0)
                        own = tl.maximum(own, tl.where(has_before, before, float("-inf")))
                    total = total + own if IS_MEAN else tl.maximum(total, own)
                    num_members += 1
            best = tl.maximum(best, total / num_members if IS_MEAN else total)
        i_scored = start - 1 + i_tile
        p_own = p_logits + i_group.to(tl.int64) * stride_logits_group + place * stride_logits_place
        tl.store(p_own + i_scored, best, (i_tile > 0) & (i_scored < num_blocks))


def score_chunks_triton(
    heads: torch.Tensor,
    gates: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    block_ids: torch.Tensor,
    rows: torch.Tensor,
    ensemble: Ensemble,
    logits: torch.Tensor,
    config: TileConfig = CONFIG,
) -> None:
    """See `op.score_chunks`."""
    num_rows, num_queries, num_layers, num_heads, width = heads.shape
    num_groups, _, num_columns = logits.shape
    per_block = codes.shape[2]
    if num_rows == 0 or num_columns == 0:
        return
    chunks_padded = triton.next_power_of_2(per_block)
    num_blocks = max(MIN_BLOCKS, config.tile_rows // chunks_padded)
    score_chunks_kernel[(triton.cdiv(num_columns, num_blocks - 1), num_rows, num_groups)](
        heads, gates, codes.view(torch.uint8), scales, block_ids, rows,
        ensemble.bias, ensemble.slope, ensemble.reach_offset, ensemble.groups, logits,
        *heads.stride()[:4], *gates.stride()[:3], *codes.stride()[:2], *scales.stride()[:2],
        block_ids.stride(0), *logits.stride()[:2], num_layers,
        QUERIES=num_queries, C=per_block, R=ensemble.reach_offset.shape[1], H=num_heads, E=width,
        C_PAD=chunks_padded, H_PAD=max(MIN_DOT, triton.next_power_of_2(num_heads)),
        E_PAD=max(MIN_DOT, triton.next_power_of_2(width)), BLOCKS=num_blocks, IS_MEAN=ensemble.aggregate == "mean",
        num_warps=config.num_warps,
    )  # fmt: skip
