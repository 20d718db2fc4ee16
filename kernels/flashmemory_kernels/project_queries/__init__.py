"""Index heads and gates of a neural indexer, from the queries of some tokens."""

from flashmemory_kernels.project_queries.op import project_queries

__all__ = ["project_queries"]
