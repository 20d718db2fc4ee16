"""Copy KV pages by index between two pools, either of which may be pinned host memory."""

from flashmemory_kernels.copy_pages.op import copy_pages

__all__ = ["copy_pages"]
