"""Checks and dispatch shared by the ops."""

from flashmemory_kernels.common.checks import expect_contiguous_rows, expect_device, expect_dtype, expect_shape
from flashmemory_kernels.common.dispatch import runs_kernel

__all__ = ["expect_contiguous_rows", "expect_device", "expect_dtype", "expect_shape", "runs_kernel"]
