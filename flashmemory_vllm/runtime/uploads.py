"""Host arrays to the device without waiting."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flashmemory_vllm.transfer.pinned import pinned


def upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy a host array on the current stream; the host neither waits nor has to keep the array.

    Args:
        array: any shape and dtype that torch knows.
        device: target.

    Returns:
        The same values on the device; on the CPU the array's own memory.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return pinned(tensor).to(device, non_blocking=True) if device.type == "cuda" else tensor
