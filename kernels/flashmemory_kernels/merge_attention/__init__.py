"""Merge two partial attention results by their log-sum-exp."""

from flashmemory_kernels.merge_attention.op import merge_attention

__all__ = ["merge_attention"]
