"""Triton kernel of `row_lse`: a program for each row and head, for all of its queries at once."""

# A Triton kernel's arguments are pointers and scalars of the traced program: Python has no types for them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201

import torch
import triton
import triton.language as tl

from flashmemory_kernels.common.due_rows import Due

NUM_QUERIES, NUM_BLOCKS = tl.constexpr(int(Due.NUM_QUERIES)), tl.constexpr(int(Due.NUM_BLOCKS))
FIRST_TILE, FIELDS = tl.constexpr(int(Due.FIRST_TILE)), tl.constexpr(len(Due))

# Masses that a program reads at once.
STEP_ELEMS = 2048
NUM_WARPS = 4


@triton.jit
def row_lse_kernel(
    p_mass, p_rows, p_lse,
    QUERIES: tl.constexpr, QUERIES_PAD: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One head of one row."""
    i_row, i_head, num_heads = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    p_row = p_rows + i_row * FIELDS
    num_queries = tl.load(p_row + NUM_QUERIES)
    num_blocks = tl.where(num_queries > 0, tl.load(p_row + NUM_BLOCKS), 0)
    age = tl.arange(0, QUERIES_PAD)
    p_head = p_mass + (tl.load(p_row + FIRST_TILE).to(tl.int64) * num_heads + i_head) * (QUERIES * TILE)
    top = tl.full((QUERIES_PAD, STEP), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES_PAD, STEP), tl.float32)
    for start in range(0, num_blocks, STEP):
        i_block = start + tl.arange(0, STEP)
        p_blocks = p_head + (i_block // TILE).to(tl.int64) * (num_heads * QUERIES * TILE) + i_block % TILE
        m_mass = (age < num_queries)[:, None] & (i_block < num_blocks)[None, :]
        mass = tl.load(p_blocks[None, :] + age[:, None] * TILE, m_mass, other=float("-inf"))
        new_top = tl.maximum(top, mass)
        # Where nothing was seen both are -inf, and their difference has no value.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - base) + tl.exp(mass - base)
        top = new_top
    peak = tl.max(top, axis=1)
    base_of_peak = tl.where(peak == float("-inf"), 0.0, peak)
    lse = base_of_peak + tl.log(tl.sum(total * tl.exp(top - base_of_peak[:, None]), axis=1))
    p_own = p_lse + (i_row * num_heads + i_head) * QUERIES + age
    tl.store(p_own, tl.where(peak == float("-inf"), float("inf"), lse), age < QUERIES)


def row_lse_triton(mass: torch.Tensor, rows: torch.Tensor, lse: torch.Tensor) -> None:
    """See `op.row_lse`."""
    _, num_heads, num_queries, tile = mass.shape
    if len(rows) == 0:
        return
    padded = triton.next_power_of_2(num_queries)
    row_lse_kernel[(len(rows), num_heads)](
        mass, rows, lse,
        QUERIES=num_queries, QUERIES_PAD=padded, TILE=tile, STEP=max(1, STEP_ELEMS // padded), num_warps=NUM_WARPS,
    )  # fmt: skip
