"""Public op `forecast_blocks`."""

import torch

from flashmemory_kernels.common import expect_device, expect_dtype, expect_shape, runs_kernel
from flashmemory_kernels.common.due_rows import Due
from flashmemory_kernels.forecast_blocks.naive import NUM_OTHERS, Head, forecast_blocks_naive, num_features


def forecast_blocks(memory: torch.Tensor, rows: torch.Tensor, head: Head, block_size: int) -> None:
    """Share that some head is expected to pay to each block of scored rows; mutates their `memory[-1]`.

    The channels of `memory` are C of shares, logits of the blocks' content by the newest queries, the same by the
    question (`NOT_ASKED` where it asked nothing), and the result, which is 0 for what is no number. A memory that knew
    nothing from before is one of the question alone. Columns from `num_blocks` on are left as they are. What rows say
    is trusted: checking it would stall the device.

    Args:
        memory: float32 [C + 3, G, P, W], rows contiguous.
        rows: int32 [n, len(Due)]; see `common.due_rows`.
        head: float32 weights, contiguous; of its H units there are a power of two.
        block_size: tokens in a block.

    Raises:
        ValueError: shape, dtype, device or strides do not match.
    """
    expect_shape("memory", memory, (None, None, None, None))
    if len(memory) < NUM_OTHERS:
        raise ValueError(f"memory: expected {NUM_OTHERS} channels or more, got {len(memory)}")
    expect_shape("rows", rows, (None, len(Due)))
    expect_dtype("rows", rows, torch.int32)
    features, units = num_features(len(memory) - NUM_OTHERS), head.hidden.shape[-1]
    if units & (units - 1):
        raise ValueError(f"hidden: expected a power of two of units, got {units}")
    shapes = ((features, units), (units,), (units,), (features,), (1,), (2,), (len(memory) - NUM_OTHERS,))
    for name, tensor, shape in zip(Head._fields, head, shapes, strict=True):
        expect_shape(name, tensor, shape)
    for name, tensor in (("memory", memory), *zip(Head._fields, head, strict=True)):
        expect_dtype(name, tensor, torch.float32)
    for name, tensor in (("rows", rows), *zip(Head._fields, head, strict=True)):
        expect_device(name, tensor, memory.device)
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    if memory.stride(3) != 1:
        raise ValueError(f"memory: expected a last dim of stride 1, got strides {memory.stride()}")
    if runs_kernel(memory):
        from flashmemory_kernels.forecast_blocks.kernel import forecast_blocks_triton

        forecast_blocks_triton(memory, rows, head, block_size)
    else:
        forecast_blocks_naive(memory, rows, head, block_size)
