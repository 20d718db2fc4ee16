"""Triton kernel of `score_blocks`: each index row is read once, whatever the number of query heads.

The op is bound by reading the index. The query heads of a KV head are padded to the width of the tensor cores,
which leaves the cores that would form the products free to keep loads in flight. Products of 16-bit values are
exact and summed in float32; a float32 index is never rounded to TF32.
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
LOW_PRECISION = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

CONFIGS = {
    (1, 128): TileConfig(tile_rows=128, programs=0, num_warps=8, num_stages=1),
    (1, 256): TileConfig(tile_rows=128, programs=0, num_warps=8, num_stages=1),
    (16, 128): TileConfig(tile_rows=128, programs=0, num_warps=8, num_stages=1),
}
# Also for every float32 product: it runs on the ordinary cores, where a larger tile does not fit the registers.
DEFAULT_CONFIG = TileConfig(tile_rows=32, programs=0, num_warps=4, num_stages=1)


# The number of blocks differs from call to call: a multiple of 16 must not compile a kernel of its own.
@triton.jit(do_not_specialize=["num_blocks"])
def score_blocks_kernel(
    p_query, p_index, p_ids, p_mass,
    stride_query_layer, stride_query_head, stride_layer, stride_block, stride_head, num_blocks, scale,
    GROUP: tl.constexpr, R: tl.constexpr, E: tl.constexpr,
    GROUP_PAD: tl.constexpr, R_PAD: tl.constexpr, E_PAD: tl.constexpr,
    TILE: tl.constexpr, IS_SINGLE: tl.constexpr, NUM_STAGES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Score tiles of TILE blocks for the query heads of one KV head in one layer.

    The ids of a tile are loaded one tile ahead, those of the first one before the query: a row waits for its id only.
    """
    i_kv_head = tl.program_id(0).to(tl.int64)
    i_layer = tl.program_id(2).to(tl.int64)
    num_heads = tl.num_programs(0) * GROUP
    i_member = tl.arange(0, GROUP_PAD)
    i_dim = tl.arange(0, E_PAD)
    i_row = tl.arange(0, TILE * R_PAD)
    m_member = i_member < GROUP
    m_dim = i_dim < E
    i_head = i_kv_head * GROUP + i_member
    first = tl.program_id(1)
    last = first + 1 if IS_SINGLE else tl.cdiv(num_blocks, TILE)
    stride_tile = 1 if IS_SINGLE else tl.num_programs(1)
    i_position = first * TILE + i_row // R_PAD
    i_block = tl.load(p_ids + i_position, i_position < num_blocks, other=0)
    p_heads = p_query + i_layer * stride_query_layer + i_head * stride_query_head
    query = tl.load(p_heads[None, :] + i_dim[:, None], m_dim[:, None] & m_member[None, :], other=0.0).to(DTYPE)
    p_layer = p_index + i_layer * stride_layer + i_kv_head * stride_head
    for i_tile in tl.range(first, last, stride_tile, num_stages=NUM_STAGES):
        m_row = (i_tile * TILE + i_row // R_PAD < num_blocks) & (i_row % R_PAD < R)
        p_rows = p_layer + i_block * stride_block + i_row % R_PAD * E
        rows = tl.load(
            p_rows[:, None] + i_dim[None, :], m_row[:, None] & m_dim[None, :],
            other=0.0, eviction_policy="evict_first",
        )  # fmt: skip
        i_position = (i_tile + stride_tile) * TILE + i_row // R_PAD
        i_block = tl.load(p_ids + i_position, i_position < num_blocks, other=0)
        mass = tl.dot(rows.to(DTYPE), query, input_precision="ieee") * scale  # [TILE * R_PAD, GROUP_PAD]
        if R_PAD > 1:
            logits = tl.where((i_row % R_PAD < R)[:, None], mass, float("-inf"))
            logits = tl.reshape(logits, (TILE, R_PAD, GROUP_PAD))
            top = tl.max(logits, axis=1)
            mass = top + tl.log(tl.sum(tl.exp(logits - top[:, None, :]), axis=1))
        i_scored = i_tile * TILE + tl.arange(0, TILE)
        p_scored = p_mass + (i_layer * num_heads + i_head)[None, :] * num_blocks + i_scored[:, None]
        tl.store(p_scored, mass, (i_scored < num_blocks)[:, None] & m_member[None, :])


def score_blocks_triton(
    query: torch.Tensor,
    index: torch.Tensor,
    block_ids: torch.Tensor,
    scale: float,
    config: TileConfig | None = None,
) -> torch.Tensor:
    """See `op.score_blocks`; the rows of one block and KV head must be contiguous."""
    num_layers, num_heads, width = query.shape
    _, _, num_kv_heads, num_rows, _ = index.shape
    num_blocks = len(block_ids)
    mass = torch.empty(num_layers, num_heads, num_blocks, dtype=torch.float32, device=query.device)
    if num_blocks == 0:
        return mass
    group, rows_padded = num_heads // num_kv_heads, triton.next_power_of_2(num_rows)
    dtype = LOW_PRECISION.get(index.dtype, tl.float32) if query.dtype == index.dtype else tl.float32
    if config is None:
        config = DEFAULT_CONFIG if dtype == tl.float32 else CONFIGS.get((num_rows, width), DEFAULT_CONFIG)
    tile = max(1, config.tile_rows // rows_padded)
    num_programs = config.num_programs(triton.cdiv(num_blocks, tile), num_kv_heads * num_layers, query.device)
    # KV heads first: programs that run together read neighbouring memory.
    grid = (num_kv_heads, num_programs, num_layers)
    score_blocks_kernel[grid](
        query, index, block_ids, mass,
        query.stride(0), query.stride(1), *index.stride()[:3], num_blocks, scale,
        GROUP=group, R=num_rows, E=width,
        GROUP_PAD=max(MIN_DOT, triton.next_power_of_2(group)), R_PAD=rows_padded,
        E_PAD=max(MIN_DOT, triton.next_power_of_2(width)),
        TILE=tile, IS_SINGLE=config.programs == 0, NUM_STAGES=config.num_stages, DTYPE=dtype,
        num_warps=config.num_warps,
    )  # fmt: skip
    return mass
