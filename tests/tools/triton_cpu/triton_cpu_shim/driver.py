"""The driver half of the shim: one device, one stream, always active."""

import torch
import triton.backends.driver as _base
from triton.backends.compiler import GPUTarget


class InterpretedDriver(_base.DriverBase):
    """Reports the CPU as Triton's device."""

    def __init__(self) -> None:
        """Skip the base class, which sets up launching."""

    @classmethod
    def is_active(cls) -> bool:
        """Always."""
        return True

    def get_current_target(self) -> GPUTarget:
        """The target that the interpreter pretends to be."""
        return GPUTarget("cpu", 0, 32)

    def get_current_device(self) -> int:
        """The only device."""
        return 0

    def get_current_stream(self, _device: int = 0) -> int:
        """The only stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where tensors live."""
        return torch.device("cpu")


InterpretedDriver.__abstractmethods__ = frozenset()
