"""Index keys of full blocks, from their pages straight into the index."""

from flashmemory_kernels.summarise_keys.op import Kind, row_shape, summarise_keys

__all__ = ["Kind", "row_shape", "summarise_keys"]
