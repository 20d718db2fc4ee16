"""Small pinned buffers of a step, and what serves in their place when the driver has no more of them."""

import logging
from functools import cache

import torch

# Below vLLM's logger, which alone has handlers.
logger = logging.getLogger("vllm.flashmemory")

_NO_MEMORY = "out of memory"


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory; the tensor itself where there is none.

    A copy to the device from pageable memory is right as well: the driver has read the source when the call returns.
    """
    try:
        return tensor.pin_memory()
    except RuntimeError as error:
        _go_on_without(error)
        return tensor


def pinned_like(values: torch.Tensor) -> torch.Tensor:
    """An uninitialised host tensor of this shape and dtype, in pinned memory where there is some."""
    try:
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    except RuntimeError as error:
        _go_on_without(error)
        return torch.empty(values.shape, dtype=values.dtype)


def writable_by_kernels(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy that kernels of a device can write to: in pinned memory, or where there is none on the device."""
    try:
        return values.pin_memory()
    except RuntimeError as error:
        _go_on_without(error)
        return values.to(device)


def _go_on_without(error: RuntimeError) -> None:
    """Anything else than a lack of memory is passed on."""
    if _NO_MEMORY not in str(error):
        raise error
    _tell(str(error).splitlines()[0])


@cache
def _tell(reason: str) -> None:
    """Once: from here on it may happen at every step."""
    logger.warning(
        "flashmemory: no pinned memory for a small copy (%s). Such copies hold up the host from here on; give this "
        "machine more memory, or lower flashmemory.host_memory_gib", reason,
    )  # fmt: skip
