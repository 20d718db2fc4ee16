"""Attention over a contiguous run of keys, with the log-sum-exp needed to merge it with other runs."""

from flashmemory_kernels.partial_attention.op import partial_attention

__all__ = ["partial_attention"]
