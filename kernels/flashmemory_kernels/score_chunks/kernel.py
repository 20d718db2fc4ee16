"""Triton kernel of `score_chunks`: each code is read once, widened in registers and multiplied on the tensor cores.

fp16 holds every fp8 code. A query head is split into two fp16 numbers for each element, after it is divided by its
largest one: together they have 22 bits, and products and sums are float32 as in the specification.
"""

# A Triton kernel's arguments are pointers and scalars of the traced program: Python has no types for them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201, PLR0913, PLR0917

import torch
import triton
import triton.language as tl

from flashmemory_kernels.common import TileConfig

# Fewest rows, columns and terms of a product on the tensor cores.
MIN_DOT = 16

# By the width of a code.
CONFIGS = {128: TileConfig(tile_rows=64, programs=0, num_warps=4, num_stages=1)}
DEFAULT_CONFIG = TileConfig(tile_rows=32, programs=0, num_warps=4, num_stages=1)


# The number of blocks differs from call to call: a multiple of 16 must not compile a kernel of its own.
@triton.jit(do_not_specialize=["num_blocks"])
def score_chunks_kernel(
    p_query, p_gates, p_codes, p_scales, p_ids, p_bias, p_slope, p_logits,
    stride_query_token, stride_query_layer, stride_query_head, stride_gates_token, stride_gates_layer,
    stride_codes_layer, stride_codes_block, stride_scales,
    num_blocks,
    H: tl.constexpr, E: tl.constexpr, H_PAD: tl.constexpr, E_PAD: tl.constexpr,
    TILE: tl.constexpr, IS_SINGLE: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Score tiles of TILE blocks in one layer for a token; ids are loaded one tile ahead, see `score_blocks_kernel`."""
    i_layer = tl.program_id(1).to(tl.int64)
    i_token = tl.program_id(2).to(tl.int64)
    i_row = tl.arange(0, TILE)
    i_head = tl.arange(0, H_PAD)
    i_dim = tl.arange(0, E_PAD)
    m_head = i_head < H
    m_dim = i_dim < E
    first = tl.program_id(0)
    last = first + 1 if IS_SINGLE else tl.cdiv(num_blocks, TILE)
    stride_tile = 1 if IS_SINGLE else tl.num_programs(0)
    i_block = tl.load(p_ids + first * TILE + i_row, first * TILE + i_row < num_blocks, other=0)

    p_heads = p_query + i_token * stride_query_token + i_layer * stride_query_layer + i_head * stride_query_head
    query = tl.load(p_heads[None, :] + i_dim[:, None], m_dim[:, None] & m_head[None, :], other=0.0).to(tl.float32)
    peak = tl.max(tl.abs(query), axis=0)
    unit = query / tl.where(peak == 0.0, 1.0, peak)[None, :]
    high = unit.to(tl.float16)
    low = (unit - high.to(tl.float32)).to(tl.float16)
    p_own_gates = p_gates + i_token * stride_gates_token + i_layer * stride_gates_layer
    gates = peak * tl.load(p_own_gates + i_head, m_head, other=0.0).to(tl.float32)
    bias = tl.load(p_bias + i_layer).to(tl.float32)
    slope = tl.load(p_slope + i_layer).to(tl.float32)

    for i_tile in tl.range(first, last, stride_tile, num_stages=NUM_STAGES):
        i_position = i_tile * TILE + i_row
        m_row = i_position < num_blocks
        p_rows = p_codes + i_layer * stride_codes_layer + i_block * stride_codes_block
        codes = tl.load(
            p_rows[:, None] + i_dim[None, :], m_row[:, None] & m_dim[None, :],
            other=0.0, eviction_policy="evict_first",
        ).to(tl.float16)  # fmt: skip
        scales = tl.load(p_scales + i_layer * stride_scales + i_block, m_row, other=0.0)
        i_next = i_position + stride_tile * TILE
        i_block = tl.load(p_ids + i_next, i_next < num_blocks, other=0)
        products = tl.dot(codes, high, acc=tl.dot(codes, low))  # [TILE, H_PAD]
        # Not a maximum with 0, which would hide a NaN.
        rectified = tl.where(products < 0.0, 0.0, products)
        distance = (num_blocks - i_position).to(tl.float32)
        hint = bias + slope * tl.log(tl.where(m_row, distance, 1.0))
        logits = tl.sum(rectified * gates[None, :], axis=1) * scales + hint
        tl.store(p_logits + (i_token * tl.num_programs(1) + i_layer) * num_blocks + i_position, logits, m_row)


def score_chunks_triton(
    query: torch.Tensor,
    gates: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    block_ids: torch.Tensor,
    bias: torch.Tensor,
    slope: torch.Tensor,
    config: TileConfig | None = None,
) -> torch.Tensor:
    """See `op.score_chunks`."""
    num_tokens, num_layers, num_heads, width = query.shape
    num_blocks = len(block_ids)
    logits = torch.empty(num_tokens, num_layers, num_blocks, dtype=torch.float32, device=query.device)
    if num_blocks == 0:
        return logits
    if config is None:
        config = CONFIGS.get(width, DEFAULT_CONFIG)
    num_tiles = triton.cdiv(num_blocks, config.tile_rows)
    num_programs = config.num_programs(num_tiles, num_layers * num_tokens, query.device)
    score_chunks_kernel[(num_programs, num_layers, num_tokens)](
        query, gates, codes, scales, block_ids, bias, slope, logits,
        *query.stride()[:3], *gates.stride()[:2], codes.stride(0), codes.stride(1), scales.stride(0),
        num_blocks,
        H=num_heads, E=width,
        H_PAD=max(MIN_DOT, triton.next_power_of_2(num_heads)), E_PAD=max(MIN_DOT, triton.next_power_of_2(width)),
        TILE=config.tile_rows, IS_SINGLE=config.programs == 0, NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
    )  # fmt: skip
    return logits
