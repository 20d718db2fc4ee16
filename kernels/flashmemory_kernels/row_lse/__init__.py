"""Log-sum-exp of each head's log-masses over the blocks of a row, for each of its queries."""

from flashmemory_kernels.row_lse.op import row_lse

__all__ = ["row_lse"]
