"""Triton kernel of `score_rows`: each index row is read once, whatever the number of heads and queries.

Programs of a fixed number share the tiles of all rows. The queries of a KV head's query heads stand side by side in the
columns of one product, which are padded to the width of the tensor cores in any case: four queries of four heads cost
what one does. Products of 16-bit values are exact and summed in float32; a float32 index is never rounded to TF32.
"""

# A Triton kernel's arguments are pointers and scalars of the traced program: Python has no types for them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201, PLR0913, PLR0917

import torch
import triton
import triton.language as tl

from flashmemory_kernels.common import TileConfig
from flashmemory_kernels.common.due_rows import Due, padded_rows
from flashmemory_kernels.score_rows.naive import CODE_DTYPE, OnlySets

PLACE, POSITION = tl.constexpr(int(Due.PLACE)), tl.constexpr(int(Due.POSITION))
NUM_QUERIES, NUM_KNOWN = tl.constexpr(int(Due.NUM_QUERIES)), tl.constexpr(int(Due.NUM_KNOWN))
NUM_BLOCKS, FIRST_TILE = tl.constexpr(int(Due.NUM_BLOCKS)), tl.constexpr(int(Due.FIRST_TILE))
FIELDS = tl.constexpr(len(Due))

# Fewest rows, columns and terms of a product on the tensor cores.
MIN_DOT = 16
LOW_PRECISION = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# `tile_rows` are index rows of one product.
CONFIG = TileConfig(tile_rows=128, programs=4, num_warps=8, num_stages=1)
# For every float32 product: it runs on the ordinary cores, where a larger tile does not fit the registers.
FLOAT32_CONFIG = TileConfig(tile_rows=32, programs=4, num_warps=4, num_stages=1)


@triton.jit
def decode_fp8(codes):
    """Elements of fp8 e4m3 codes given as bytes, as fp16 and 2^8 times too small; exact, subnormal ones included."""
    bits = codes.to(tl.int16)
    return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def load_queries(
    p_queries, place, position, num_queries, i_kv_head, i_layer,
    stride_layer, stride_place, stride_row, stride_head, num_kept,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    COLUMNS: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    """Newest queries of a place [E_PAD, COLUMNS], by age, for each of them the query heads of one KV head."""
    i_column = tl.arange(0, COLUMNS)
    i_dim = tl.arange(0, E_PAD)
    age = i_column // GROUP
    m_column = (i_column < GROUP * QUERIES) & (age < num_queries)
    row = (tl.where(m_column, position - age, 0) % num_kept).to(tl.int64)
    i_head = i_kv_head * GROUP + i_column % GROUP
    p_columns = p_queries + i_layer * stride_layer + place * stride_place + row * stride_row + i_head * stride_head
    m_query = (i_dim < E)[:, None] & m_column[None, :]
    query = tl.load(p_columns[None, :] + (i_dim % D)[:, None], m_query, other=0.0).to(tl.float32)
    if E > D:
        # Not minimum and maximum, which would hide a NaN.
        negative, positive = tl.where(query > 0.0, 0.0, query), tl.where(query < 0.0, 0.0, query)
        query = tl.where((i_dim < D)[:, None], negative, positive)
    return query


@triton.jit
def sum_up(logits, BLOCKS: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, COLUMNS: tl.constexpr):
    """Log of the summed exponentials of each block's R logits; -inf where it is not finite."""
    mass = logits
    if R_PAD > 1:
        is_row = tl.arange(0, BLOCKS * R_PAD) % R_PAD < R
        by_block = tl.reshape(tl.where(is_row[:, None], logits, float("-inf")), (BLOCKS, R_PAD, COLUMNS))
        top = tl.max(by_block, axis=1)
        mass = top + tl.log(tl.sum(tl.exp(by_block - top[:, None, :]), axis=1))
    return tl.where(tl.abs(mass) < float("inf"), mass, float("-inf"))


@triton.jit
def may_gain(p_own_set, i_block, num_blocks, num_known):
    """Blocks in the set, and those that are newer than it."""
    held = tl.load(p_own_set + i_block, i_block < num_blocks, other=0) != 0
    return held | (i_block >= num_known)


@triton.jit(do_not_specialize=["num_rows", "num_kept"])
def score_rows_kernel(
    p_queries, p_index, p_scales, p_ids, p_rows, p_mass, p_set, p_groups,
    stride_query_layer, stride_query_place, stride_query_row, stride_query_head,
    stride_layer, stride_block, stride_head, stride_scale_layer, stride_scale_block,
    stride_ids, stride_set_group, stride_set_place, num_rows, num_kept, scale,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, R: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    COLUMNS: tl.constexpr, R_PAD: tl.constexpr, E_PAD: tl.constexpr, N_PAD: tl.constexpr,
    BLOCKS: tl.constexpr, TILE: tl.constexpr, NUM_STAGES: tl.constexpr,
    IS_FP8: tl.constexpr, HAS_SET: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Score tiles for the query heads of one KV head in one layer, BLOCKS blocks in a product."""
    i_kv_head, i_layer = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    num_heads = tl.num_programs(0) * GROUP
    i_rows = tl.arange(0, N_PAD)
    m_rows = i_rows < num_rows
    first_tiles = tl.load(p_rows + i_rows * FIELDS + FIRST_TILE, m_rows, other=2147483647)
    is_scored = m_rows & (tl.load(p_rows + i_rows * FIELDS + NUM_QUERIES, m_rows, other=0) > 0)
    row_tiles = tl.cdiv(tl.load(p_rows + i_rows * FIELDS + NUM_BLOCKS, m_rows, other=0), TILE)
    num_tiles = tl.max(tl.where(is_scored, first_tiles + row_tiles, 0), axis=0)
    i_column = tl.arange(0, COLUMNS)
    i_dim = tl.arange(0, E_PAD)
    i_line = tl.arange(0, BLOCKS * R_PAD)
    p_layer = p_index + i_layer * stride_layer + i_kv_head * stride_head
    for i_tile in range(tl.program_id(1), num_tiles, tl.num_programs(1)):
        # Rows without tiles begin where the next one does: the last one that begins here has the tile.
        p_row = p_rows + (tl.sum((first_tiles <= i_tile).to(tl.int32), axis=0) - 1) * FIELDS
        place, num_blocks = tl.load(p_row + PLACE).to(tl.int64), tl.load(p_row + NUM_BLOCKS)
        num_queries, first = tl.load(p_row + NUM_QUERIES), (i_tile - tl.load(p_row + FIRST_TILE)) * TILE
        query = load_queries(
            p_queries, place, tl.load(p_row + POSITION), num_queries, i_kv_head, i_layer,
            stride_query_layer, stride_query_place, stride_query_row, stride_query_head, num_kept,
            GROUP, QUERIES, D, E, COLUMNS, E_PAD,
        ).to(DTYPE)  # fmt: skip
        p_own_ids = p_ids + place * stride_ids
        m_column = (i_column < GROUP * QUERIES) & (i_column // GROUP < num_queries)
        i_member = i_layer * num_heads + i_kv_head * GROUP + i_column % GROUP
        i_mass = (tl.cast(i_tile, tl.int64) * num_heads * tl.num_programs(2) + i_member) * QUERIES + i_column // GROUP
        if HAS_SET:
            num_known = tl.load(p_row + NUM_KNOWN)
            p_own_set = p_set + tl.load(p_groups + i_layer).to(tl.int64) * stride_set_group + place * stride_set_place
        for start in tl.range(0, TILE, BLOCKS, num_stages=NUM_STAGES):
            i_position = first + start + i_line // R_PAD
            m_line = (i_position < num_blocks) & (i_line % R_PAD < R)
            i_block = tl.load(p_own_ids + i_position, i_position < num_blocks, other=0).to(tl.int64)
            i_scored = first + start + tl.arange(0, BLOCKS)
            if HAS_SET:
                m_line = m_line & may_gain(p_own_set, i_position, num_blocks, num_known)
            p_lines = p_layer + i_block * stride_block + i_line % R_PAD * E
            lines = tl.load(
                p_lines[:, None] + i_dim[None, :], m_line[:, None] & (i_dim < E)[None, :],
                other=0, eviction_policy="evict_first",
            )  # fmt: skip
            if IS_FP8:
                p_block_scales = p_scales + i_layer * stride_scale_layer + i_block * stride_scale_block + i_kv_head
                factor = tl.load(p_block_scales, m_line, other=0.0) * (256.0 * scale)
                logits = tl.dot(decode_fp8(lines).to(DTYPE), query, input_precision="ieee") * factor[:, None]
            else:
                logits = tl.dot(lines.to(DTYPE), query, input_precision="ieee") * scale
            mass = sum_up(logits, BLOCKS, R, R_PAD, COLUMNS)
            if HAS_SET:
                mass = tl.where(may_gain(p_own_set, i_scored, num_blocks, num_known)[:, None], mass, float("-inf"))
            p_scored = p_mass + i_mass[None, :] * TILE + (start + tl.arange(0, BLOCKS))[:, None]
            tl.store(p_scored, mass, (i_scored < num_blocks)[:, None] & m_column[None, :])


def score_rows_triton(
    queries: torch.Tensor,
    index: torch.Tensor,
    scales: torch.Tensor | None,
    block_ids: torch.Tensor,
    rows: torch.Tensor,
    scale: float,
    mass: torch.Tensor,
    only: OnlySets | None = None,
    config: TileConfig | None = None,
) -> None:
    """See `op.score_rows`."""
    num_layers, _, num_kept, num_heads, head_dim = queries.shape
    _, _, num_kv_heads, num_index_rows, width = index.shape
    num_tiles, _, num_queries, tile = mass.shape
    if len(rows) == 0 or num_tiles == 0:
        return
    is_fp8 = index.dtype == CODE_DTYPE
    dtype = LOW_PRECISION.get(queries.dtype, tl.float32)
    if is_fp8 and dtype == tl.bfloat16:
        dtype = tl.float16  # which codes are decoded to; a bf16 query is the same in it, but for elements beyond 65504
    if config is None:
        config = FLOAT32_CONFIG if dtype == tl.float32 else CONFIG
    group, rows_padded = num_heads // num_kv_heads, triton.next_power_of_2(num_index_rows)
    if is_fp8:
        index = index.view(torch.uint8)
    # Stands for tensors that are not there
    nothing = rows
    grid = (num_kv_heads, config.num_programs(num_tiles, num_kv_heads * num_layers, queries.device), num_layers)
    score_rows_kernel[grid](
        queries, index, nothing if scales is None else scales, block_ids, rows, mass,
        nothing if only is None else only.in_set, nothing if only is None else only.groups,
        *queries.stride()[:4], *index.stride()[:3], *((0, 0) if scales is None else scales.stride()[:2]),
        block_ids.stride(0), *((0, 0) if only is None else only.in_set.stride()[:2]), len(rows), num_kept, scale,
        GROUP=group, QUERIES=num_queries, R=num_index_rows, D=head_dim, E=width,
        COLUMNS=max(MIN_DOT, triton.next_power_of_2(group * num_queries)), R_PAD=rows_padded,
        E_PAD=max(MIN_DOT, triton.next_power_of_2(width)), N_PAD=padded_rows(len(rows)),
        BLOCKS=min(tile, max(1, MIN_DOT // rows_padded, config.tile_rows // rows_padded)), TILE=tile,
        NUM_STAGES=config.num_stages, IS_FP8=is_fp8, HAS_SET=only is not None, DTYPE=dtype,
        num_warps=config.num_warps,
    )  # fmt: skip
