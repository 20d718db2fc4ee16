"""Public op `row_lse`."""

import torch

from flashmemory_kernels.common import expect_device, expect_dtype, expect_shape, runs_kernel
from flashmemory_kernels.common.due_rows import Due
from flashmemory_kernels.row_lse.naive import row_lse_naive


def row_lse(mass: torch.Tensor, rows: torch.Tensor, lse: torch.Tensor, *, is_checked: bool = False) -> None:
    """Log-sum-exp of log-masses over the blocks of each row: `exp(mass - lse)` is a block's share; writes all of `lse`.

    It is +inf where a head sees no block, for queries that a row does not have and for rows that are not scored: every
    share is 0 then. What rows say is trusted: checking it would stall the device.

    Args:
        mass: float32 [tiles, M, Q, TILE] of `score_rows`, queries by age; finite or -inf.
        rows: int32 [n, len(Due)]; see `common.due_rows`.
        lse: float32 [n, M, Q].
        is_checked: an earlier call with such arguments was checked, which takes as long as a launch. Default: False.

    Raises:
        ValueError: shape, dtype, device or strides do not match.
    """
    if not is_checked:
        _expect(mass, rows, lse)
    if runs_kernel(mass):
        from flashmemory_kernels.row_lse.kernel import row_lse_triton

        row_lse_triton(mass, rows, lse)
    else:
        row_lse_naive(mass, rows, lse)


def _expect(mass: torch.Tensor, rows: torch.Tensor, lse: torch.Tensor) -> None:
    expect_shape("mass", mass, (None, None, None, None))
    expect_shape("rows", rows, (None, len(Due)))
    expect_shape("lse", lse, (len(rows), *mass.shape[1:3]))
    expect_dtype("rows", rows, torch.int32)
    for name, tensor in (("mass", mass), ("lse", lse)):
        expect_dtype(name, tensor, torch.float32)
    for name, tensor in (("mass", mass), ("rows", rows), ("lse", lse)):
        expect_device(name, tensor, mass.device)
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
