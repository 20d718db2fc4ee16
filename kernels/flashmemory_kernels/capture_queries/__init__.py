"""The queries of a step's tokens, into a ring of queries for each request."""

from flashmemory_kernels.capture_queries.op import capture_queries

__all__ = ["capture_queries"]
