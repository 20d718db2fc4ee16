"""Public op `capture_queries`."""

import torch

from flashmemory_kernels.capture_queries.naive import capture_queries_naive
from flashmemory_kernels.common import expect_contiguous_rows, expect_device, expect_dtype, expect_shape, runs_kernel


def capture_queries(query: torch.Tensor, query_row: torch.Tensor, queries: torch.Tensor) -> None:
    """Keep the queries of a step's tokens in one anchor layer; mutates `queries[query_row[i]]` for rows of 0 or more.

    With P places of Q queries each the row of a token is `place * Q + position % Q`, so that a place has its newest Q
    queries, whatever the steps were that they came in. `query_row` is read on the device: a captured graph keeps what
    the step says. Rows are trusted, and distinct but for -1: checking them would stall the device.

    Args:
        query: [T, Hq, D], heads of a token at any stride.
        query_row: int32 [R], R <= T, of the first R tokens; -1 in those that are not kept, such as padding.
        queries: [P * Q, Hq, D] of the same dtype.

    Raises:
        ValueError: shape, dtype, device or strides do not match.
    """
    expect_shape("query", query, (None, None, None))
    expect_shape("query_row", query_row, (None,))
    expect_shape("queries", queries, (None, *query.shape[1:]))
    if len(query_row) > len(query):
        raise ValueError(f"query_row: expected at most {len(query)} rows, got {len(query_row)}")
    expect_dtype("query_row", query_row, torch.int32)
    expect_dtype("queries", queries, query.dtype)
    for name, tensor in (("query", query), ("query_row", query_row), ("queries", queries)):
        expect_device(name, tensor, query.device)
        expect_contiguous_rows(name, tensor)
    if runs_kernel(query):
        from flashmemory_kernels.capture_queries.kernel import capture_queries_triton

        capture_queries_triton(query, query_row, queries)
    else:
        capture_queries_naive(query, query_row, queries)
