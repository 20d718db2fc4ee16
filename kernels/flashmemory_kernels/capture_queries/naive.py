"""Specification and CPU path of `capture_queries`."""

import torch


def capture_queries_naive(query: torch.Tensor, query_row: torch.Tensor, queries: torch.Tensor) -> None:
    """See `op.capture_queries`."""
    (kept,) = torch.nonzero(query_row >= 0, as_tuple=True)
    queries[query_row[kept].long()] = query[kept]
