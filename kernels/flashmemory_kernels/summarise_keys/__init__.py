"""Summaries of a block's keys: their mean, or their bounds per channel."""

from flashmemory_kernels.summarise_keys.op import summarise_keys

__all__ = ["summarise_keys"]
