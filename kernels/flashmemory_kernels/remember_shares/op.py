"""Public op `remember_shares`."""

import torch

from flashmemory_kernels.common import expect_device, expect_dtype, expect_shape, runs_kernel
from flashmemory_kernels.common.due_rows import Due
from flashmemory_kernels.remember_shares.channels import Channels
from flashmemory_kernels.remember_shares.naive import remember_shares_naive


def remember_shares(
    mass: torch.Tensor,
    lse: torch.Tensor,
    rows: torch.Tensor,
    groups: torch.Tensor,
    channels: Channels,
    memory: torch.Tensor,
    *,
    is_checked: bool = False,
) -> None:
    """Bring the memory of scored rows up to date with their newest queries; mutates `memory[:, :, place, :num_blocks]`.

    A head's share of a block is `exp(mass - lse)`; one that is not a number counts 0, so that a memory never has such.
    A query of age a counts `decay^a` as much as the newest one, what was remembered `decay^elapsed`; blocks that the
    memory did not know start from 0. Columns from `num_blocks` on are left as they are and mean nothing. What rows say
    is trusted: checking it would stall the device.

    Args:
        mass: float32 [tiles, M, Q, TILE] of `score_rows`, M = A * Hq heads, queries by age; TILE is a power of two.
        lse: float32 [n, M, Q] of `row_lse`.
        rows: int32 [n, len(Due)]; see `common.due_rows`.
        groups: int32 [A], layer group of each layer, trusted: each of the G groups has a layer.
        channels: the C channels.
        memory: float32 [C, G, P, W], rows contiguous.
        is_checked: an earlier call with such arguments was checked, which takes as long as a launch. Default: False.

    Raises:
        ValueError: shape, dtype, device or strides do not match.
    """
    if not is_checked:
        _expect(mass, lse, rows, groups, channels, memory)
    if runs_kernel(memory):
        from flashmemory_kernels.remember_shares.kernel import remember_shares_triton

        remember_shares_triton(mass, lse, rows, groups, channels, memory)
    else:
        remember_shares_naive(mass, lse, rows, groups, channels, memory)


def _expect(
    mass: torch.Tensor,
    lse: torch.Tensor,
    rows: torch.Tensor,
    groups: torch.Tensor,
    channels: Channels,
    memory: torch.Tensor,
) -> None:
    expect_shape("rows", rows, (None, len(Due)))
    expect_shape("mass", mass, (None, None, None, None))
    _, num_heads, num_queries, tile = mass.shape
    expect_shape("lse", lse, (len(rows), num_heads, num_queries))
    expect_shape("groups", groups, (None,))
    expect_shape("memory", memory, (len(channels.decays), None, None, None))
    if num_heads % len(groups):
        raise ValueError(f"groups: expected a number of layers that divides {num_heads} heads, got {len(groups)}")
    if tile & (tile - 1):
        raise ValueError(f"mass: expected tiles of a power of two, got {tile}")
    for name, tensor, dtype in (
        ("mass", mass, torch.float32), ("lse", lse, torch.float32), ("rows", rows, torch.int32),
        ("groups", groups, torch.int32), ("memory", memory, torch.float32),
    ):  # fmt: skip
        expect_dtype(name, tensor, dtype)
        expect_device(name, tensor, memory.device)
        if name != "memory" and not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    if memory.stride(3) != 1:
        raise ValueError(f"memory: expected a last dim of stride 1, got strides {memory.stride()}")
