"""Attention over keys in pages, with the log-sum-exp needed to merge it with attention over other keys."""

from flashmemory_kernels.partial_attention.op import partial_attention

__all__ = ["partial_attention"]
