"""Spread a step's compacted block tables and lengths over the persistent device tensors."""

from flashmemory_kernels.compact_tables.op import compact_tables

__all__ = ["compact_tables"]
