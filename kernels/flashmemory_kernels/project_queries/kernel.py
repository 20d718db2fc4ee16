"""Triton kernels of `project_queries`: down to the bottleneck in slices of the features, then up from their sum.

One query times a matrix is bound by reading the matrix, and a slice of it is what one program can read. The slices
are summed in a fixed order, so equal queries give equal bits.
"""

# A Triton kernel's arguments are pointers and scalars of the traced program: Python has no types for them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201, PLR0913, PLR0917

import torch
import triton
import triton.language as tl

# Features of one slice, those read at once, the most elements of the bottleneck that a program forms, and the slices
# that are summed at once.
SLICE = 128
TILE_FEATURES = 32
TILE_RANK = 128
TILE_SLICES = 16
DOWN_WARPS = 4
# Weights of the way up that a program holds at once, in columns of the whole bottleneck.
UP_ELEMS = 16384
MAX_COLUMNS = 32
UP_WARPS = 8


@triton.jit
def down_kernel(
    p_queries, p_spread, p_down, p_partial,
    F: tl.constexpr, R: tl.constexpr, SLICE: tl.constexpr, TILE_F: tl.constexpr, TILE_R: tl.constexpr,
):  # fmt: skip
    """Products of one slice of the features of one layer with TILE_R columns of its matrix."""
    i_slice = tl.program_id(0)
    i_layer = tl.program_id(2).to(tl.int64)
    i_rank = tl.program_id(1) * TILE_R + tl.arange(0, TILE_R)
    m_rank = i_rank < R
    p_matrix = p_down + i_layer * (2 * F * R)
    total = tl.zeros((TILE_F, TILE_R), tl.float32)
    for start in tl.static_range(0, SLICE, TILE_F):
        i_feature = i_slice * SLICE + start + tl.arange(0, TILE_F)
        m_feature = i_feature < F
        m_weight = m_feature[:, None] & m_rank[None, :]
        p_weight = p_matrix + i_feature[:, None] * R + i_rank[None, :]
        signed = tl.load(p_weight, m_weight, other=0.0)
        absolute = tl.load(p_weight + F * R, m_weight, other=0.0)
        query = tl.load(p_queries + i_layer * F + i_feature, m_feature, other=0.0).to(tl.float32)
        scaled = query / tl.load(p_spread + i_layer * F + i_feature, m_feature, other=1.0)
        total += scaled[:, None] * signed + tl.abs(scaled)[:, None] * absolute
    tl.store(p_partial + (i_layer * tl.num_programs(0) + i_slice) * R + i_rank, tl.sum(total, axis=0), m_rank)


@triton.jit
def up_kernel(
    p_partial, p_norm, p_up, p_gate, p_gate_bias, p_heads, p_gates,
    eps,
    R: tl.constexpr, C: tl.constexpr, H: tl.constexpr, R_PAD: tl.constexpr, TILE_C: tl.constexpr,
    NUM_SLICES: tl.constexpr, TILE_S: tl.constexpr,
):  # fmt: skip
    """TILE_C columns of the index heads of one layer; the last programs of a layer form the gates."""
    i_layer = tl.program_id(1).to(tl.int64)
    i_rank = tl.arange(0, R_PAD)
    m_rank = i_rank < R
    i_column = tl.program_id(0) * TILE_C + tl.arange(0, TILE_C)
    i_gate = i_column - (C + TILE_C - 1) // TILE_C * TILE_C
    m_column = i_column < C
    m_gate = (i_gate >= 0) & (i_gate < H)
    # Before the bottleneck is there, as they take longest. One of the two is masked out whole and reads nothing.
    i_row = i_layer * R + i_rank[:, None]
    weight = tl.load(p_up + i_row * C + i_column[None, :], m_rank[:, None] & m_column[None, :], other=0.0)
    weight += tl.load(p_gate + i_row * H + i_gate[None, :], m_rank[:, None] & m_gate[None, :], other=0.0)

    slices = tl.zeros((TILE_S, R_PAD), tl.float32)
    for start in tl.static_range(0, NUM_SLICES, TILE_S):
        i_slice = start + tl.arange(0, TILE_S)
        p_slices = p_partial + (i_layer * NUM_SLICES + i_slice)[:, None] * R + i_rank[None, :]
        slices += tl.load(p_slices, (i_slice < NUM_SLICES)[:, None] & m_rank[None, :], other=0.0)
    hidden = tl.sum(slices, axis=0)
    norm = tl.load(p_norm + i_layer * R + i_rank, m_rank, other=0.0)
    hidden = hidden * norm * tl.rsqrt(tl.sum(hidden * hidden, axis=0) / R + eps)

    result = tl.sum(hidden[:, None] * weight, axis=0)
    result += tl.load(p_gate_bias + i_layer * H + i_gate, m_gate, other=0.0)
    tl.store(p_heads + i_layer * C + i_column, result, m_column)
    tl.store(p_gates + i_layer * H + i_gate, result, m_gate)


def project_queries_triton(
    queries: torch.Tensor,
    spread: torch.Tensor,
    down: torch.Tensor,
    norm: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor,
    gate_bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `op.project_queries`; of one token."""
    num_layers, num_features = spread.shape
    _, rank, num_columns = up.shape
    num_heads = gate.shape[2]
    num_slices = triton.cdiv(num_features, SLICE)
    rank_padded = triton.next_power_of_2(rank)
    tile_rank = min(TILE_RANK, rank_padded)
    tile_columns = max(1, min(MAX_COLUMNS, UP_ELEMS // rank_padded))
    partial = torch.empty(num_layers, num_slices, rank, dtype=torch.float32, device=queries.device)
    heads = torch.empty(num_layers, num_heads, num_columns // num_heads, dtype=torch.float32, device=queries.device)
    gates = torch.empty_like(gate_bias)
    down_kernel[(num_slices, triton.cdiv(rank, tile_rank), num_layers)](
        queries.contiguous(), spread, down, partial,
        F=num_features, R=rank, SLICE=SLICE, TILE_F=TILE_FEATURES, TILE_R=tile_rank, num_warps=DOWN_WARPS,
    )  # fmt: skip
    num_tiles = triton.cdiv(num_columns, tile_columns) + triton.cdiv(num_heads, tile_columns)
    up_kernel[(num_tiles, num_layers)](
        partial, norm, up, gate, gate_bias, heads, gates, eps,
        R=rank, C=num_columns, H=num_heads, R_PAD=rank_padded, TILE_C=tile_columns,
        NUM_SLICES=num_slices, TILE_S=TILE_SLICES, num_warps=UP_WARPS,
    )  # fmt: skip
    return heads.unsqueeze(0), gates.unsqueeze(0)
