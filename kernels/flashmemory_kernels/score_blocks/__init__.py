"""Log of the attention mass of each block, from whatever represents its keys."""

from flashmemory_kernels.score_blocks.op import score_blocks

__all__ = ["score_blocks"]
