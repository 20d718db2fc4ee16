"""Index heads and gates of a neural indexer, from one token's queries."""

from flashmemory_kernels.project_queries.op import project_queries

__all__ = ["project_queries"]
