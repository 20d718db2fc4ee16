"""Triton kernel of `capture_queries`: nothing in its launch depends on the step, so a captured graph may hold it."""

# A Triton kernel's arguments are pointers and scalars of the traced program: Python has no types for them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201, PLR0913, PLR0917

import torch
import triton
import triton.language as tl

NUM_WARPS = 4


@triton.jit
def capture_queries_kernel(
    p_query, p_query_row, p_queries,
    stride_token, stride_head, stride_row, stride_row_head,
    H: tl.constexpr, D: tl.constexpr, ELEMS_PAD: tl.constexpr,
):  # fmt: skip
    """Copy the query heads of one token."""
    i_token = tl.program_id(0).to(tl.int64)
    row = tl.load(p_query_row + i_token).to(tl.int64)
    if row >= 0:
        i_elem = tl.arange(0, ELEMS_PAD)
        i_head, i_dim = i_elem // D, i_elem % D
        m_elem = i_elem < H * D
        heads = tl.load(p_query + i_token * stride_token + i_head * stride_head + i_dim, m_elem)
        tl.store(p_queries + row * stride_row + i_head * stride_row_head + i_dim, heads, m_elem)


def capture_queries_triton(query: torch.Tensor, query_row: torch.Tensor, queries: torch.Tensor) -> None:
    """See `op.capture_queries`."""
    _, num_heads, head_dim = query.shape
    if len(query_row) == 0:
        return
    capture_queries_kernel[(len(query_row),)](
        query, query_row, queries,
        query.stride(0), query.stride(1), queries.stride(0), queries.stride(1),
        H=num_heads, D=head_dim, ELEMS_PAD=triton.next_power_of_2(num_heads * head_dim),
        num_warps=NUM_WARPS,
    )  # fmt: skip
