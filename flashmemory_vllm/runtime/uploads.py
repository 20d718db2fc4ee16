"""Host arrays to the device without waiting."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flashmemory_vllm.residency.types import IntArray
from flashmemory_vllm.transfer.pinned import pinned, pinned_like

# The host is two steps ahead of the device at most, so it does not wait for one of four.
NUM_BUFFERS = 4


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


class UploadRing:
    """The upload of every step, by one stream, through memory that is there already.

    Args:
        num_elems: most elements of an upload; a larger one takes memory of its own.
        device: target.
    """

    def __init__(self, num_elems: int, device: torch.device) -> None:
        self._device = device
        self._num_elems = num_elems
        self._next = 0
        if device.type == "cuda":
            like = torch.empty(num_elems, dtype=torch.int32)
            self._buffers = [pinned_like(like) for _ in range(NUM_BUFFERS)]
            self._arrays = [buffer.numpy() for buffer in self._buffers]
            self._sent = [torch.cuda.Event() for _ in self._buffers]  # type: ignore[no-untyped-call]
            self._target = torch.empty(num_elems, dtype=torch.int32, device=device)

    def upload(self, array: IntArray) -> torch.Tensor:
        """Copy int32 `[n]` on the current stream; the host does not have to keep it.

        Returns:
            The same values on the device, until the next upload; on the CPU the array's own memory.
        """
        if self._device.type != "cuda" or array.size > self._num_elems:
            return upload(array, self._device)
        sent, at = self._sent[self._next], self._next
        self._next = (at + 1) % NUM_BUFFERS
        sent.synchronize()
        self._arrays[at][: array.size] = array
        target = self._target[: array.size]
        target.copy_(self._buffers[at][: array.size], non_blocking=True)
        sent.record()
        return target
