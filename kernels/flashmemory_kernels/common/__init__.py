"""Checks, dispatch and tiling shared by the ops."""

from flashmemory_kernels.common.aggregate import Aggregate, aggregated
from flashmemory_kernels.common.checks import expect_contiguous_rows, expect_device, expect_dtype, expect_shape
from flashmemory_kernels.common.dispatch import runs_kernel
from flashmemory_kernels.common.tiles import TileConfig

__all__ = [
    "Aggregate",
    "TileConfig",
    "aggregated",
    "expect_contiguous_rows",
    "expect_device",
    "expect_dtype",
    "expect_shape",
    "runs_kernel",
]
