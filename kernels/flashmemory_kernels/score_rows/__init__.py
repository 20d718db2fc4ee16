"""Log of the attention mass of each block of all due requests, under several queries of each."""

from flashmemory_kernels.score_rows.naive import OnlySets
from flashmemory_kernels.score_rows.op import score_rows

__all__ = ["OnlySets", "score_rows"]
