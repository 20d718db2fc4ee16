"""Triton kernel of `score_blocks`: each index row is read once, whatever the number of query heads.

The op is bound by reading the index, so the products need no tensor cores: they run in plain float32 for
every dtype.
"""

# A Triton kernel's arguments are pointers and scalars of the traced program: Python has no types for them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201, PLR0913, PLR0917

import torch
import triton
import triton.language as tl

# Elements of the index that one program holds in registers.
TILE_ELEMS = 4096
ELEMS_PER_WARP = 2048


@triton.jit
def score_blocks_kernel(
    p_query, p_index, p_ids, p_mass,
    stride_block, stride_head, num_blocks, scale,
    GROUP: tl.constexpr, R: tl.constexpr, E: tl.constexpr,
    TILE: tl.constexpr, R_PAD: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    """Score TILE blocks for the query heads of one KV head."""
    i_position = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    i_kv_head = tl.program_id(1).to(tl.int64)
    i_row = tl.arange(0, R_PAD)
    i_dim = tl.arange(0, E_PAD)
    m_position = i_position < num_blocks
    m_row = i_row < R
    m_dim = i_dim < E
    i_block = tl.load(p_ids + i_position, m_position, other=0)
    p_rows = p_index + i_kv_head * stride_head + i_block[:, None, None] * stride_block
    m_rows = m_position[:, None, None] & m_row[None, :, None] & m_dim[None, None, :]
    rows = tl.load(p_rows + i_row[None, :, None] * E + i_dim[None, None, :], m_rows, other=0.0).to(tl.float32)
    for i_member in range(GROUP):
        i_head = i_kv_head * GROUP + i_member
        query = tl.load(p_query + i_head * E + i_dim, m_dim, other=0.0).to(tl.float32) * scale
        logits = tl.sum(rows * query[None, None, :], axis=2)  # [TILE, R_PAD]
        logits = tl.where(m_row[None, :], logits, float("-inf"))
        top = tl.max(logits, axis=1)
        mass = top + tl.log(tl.sum(tl.exp(logits - top[:, None]), axis=1))
        tl.store(p_mass + i_head * num_blocks + i_position, mass, m_position)


def score_blocks_triton(
    query: torch.Tensor, index: torch.Tensor, block_ids: torch.Tensor, scale: float
) -> torch.Tensor:
    """See `op.score_blocks`; the rows of one block and KV head must be contiguous."""
    num_heads, width = query.shape
    _, num_kv_heads, num_rows, _ = index.shape
    num_blocks = len(block_ids)
    mass = torch.empty(num_heads, num_blocks, dtype=torch.float32, device=query.device)
    if num_blocks == 0:
        return mass
    rows_padded, width_padded = triton.next_power_of_2(num_rows), triton.next_power_of_2(width)
    tile = max(1, TILE_ELEMS // (rows_padded * width_padded))
    num_warps = min(16, max(1, tile * rows_padded * width_padded // ELEMS_PER_WARP))
    score_blocks_kernel[(triton.cdiv(num_blocks, tile), num_kv_heads)](
        query.contiguous(), index, block_ids.contiguous(), mass,
        index.stride(0), index.stride(1), num_blocks, scale,
        GROUP=num_heads // num_kv_heads, R=num_rows, E=width,
        TILE=tile, R_PAD=rows_padded, E_PAD=width_padded, num_warps=num_warps,
    )  # fmt: skip
    return mass
