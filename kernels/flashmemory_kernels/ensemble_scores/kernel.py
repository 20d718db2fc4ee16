"""Triton kernels of `ensemble_scores`: the log-sum-exp of every head, then shares and their combination.

The log-mass is read twice and nothing as large as it is written.
"""

# A Triton kernel's arguments are pointers and scalars of the traced program: Python has no types for them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201, PLR0913, PLR0917

import torch
import triton
import triton.language as tl

REDUCE_TILE = 8192
REDUCE_WARPS = 16
COMBINE_TILE = 64
COMBINE_WARPS = 4


# The number of blocks differs from call to call: a multiple of 16 must not compile a kernel of its own.
@triton.jit(do_not_specialize=["num_blocks"])
def head_lse_kernel(p_mass, p_lse, num_blocks, TILE: tl.constexpr):
    """Log-sum-exp of one head of one layer over the blocks; +inf if it sees none, so that every share is 0."""
    i_head = tl.program_id(0)
    p_row = p_mass + i_head.to(tl.int64) * num_blocks
    top = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    for start in range(0, num_blocks, TILE):
        i_block = start + tl.arange(0, TILE)
        mass = tl.load(p_row + i_block, i_block < num_blocks, other=float("-inf"))
        new_top = tl.maximum(top, mass)
        # Where nothing was seen both are -inf, and their difference has no value.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - base) + tl.exp(mass - base)
        top = new_top
    peak = tl.max(top, axis=0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    lse = base + tl.log(tl.sum(total * tl.exp(top - base), axis=0))
    tl.store(p_lse + i_head, tl.where(peak == float("-inf"), float("inf"), lse))


@triton.jit(do_not_specialize=["num_blocks"])
def combine_kernel(
    p_mass, p_lse, p_groups, p_scores,
    num_blocks, num_layers, H: tl.constexpr, H_PAD: tl.constexpr, IS_MAX: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Scores of TILE blocks in one layer group."""
    i_block = tl.program_id(0) * TILE + tl.arange(0, TILE)
    i_group = tl.program_id(1).to(tl.int64)
    i_head = tl.arange(0, H_PAD)
    m_head = i_head < H
    m_block = i_block < num_blocks
    score = tl.zeros((TILE,), tl.float32)
    count = 0
    for i_layer in range(num_layers):
        if tl.load(p_groups + i_layer) == i_group:
            i_row = (i_layer * H + i_head).to(tl.int64)
            mass = tl.load(
                p_mass + i_row[:, None] * num_blocks + i_block[None, :],
                m_head[:, None] & m_block[None, :], other=float("-inf"),
            )  # fmt: skip
            lse = tl.load(p_lse + i_row, m_head, other=float("inf"))
            shares = tl.exp(mass - lse[:, None])
            if IS_MAX:
                score = tl.maximum(score, tl.max(shares, axis=0))
            else:
                score += tl.sum(shares, axis=0)
            count += H
    if not IS_MAX:
        score /= count
    tl.store(p_scores + i_group * num_blocks + i_block, score, m_block)


def ensemble_scores_triton(
    mass: torch.Tensor, layer_groups: torch.Tensor, num_groups: int, aggregate: str
) -> torch.Tensor:
    """See `op.ensemble_scores`."""
    num_layers, num_heads, num_blocks = mass.shape
    scores = torch.empty(num_groups, num_blocks, dtype=torch.float32, device=mass.device)
    if num_blocks == 0:
        return scores
    lse = torch.empty(num_layers * num_heads, dtype=torch.float32, device=mass.device)
    head_lse_kernel[(len(lse),)](mass, lse, num_blocks, TILE=REDUCE_TILE, num_warps=REDUCE_WARPS)
    combine_kernel[(triton.cdiv(num_blocks, COMBINE_TILE), num_groups)](
        mass, lse, layer_groups, scores,
        num_blocks, num_layers, H=num_heads, H_PAD=triton.next_power_of_2(num_heads),
        IS_MAX=aggregate == "max", TILE=COMBINE_TILE, num_warps=COMBINE_WARPS,
    )  # fmt: skip
    return scores
