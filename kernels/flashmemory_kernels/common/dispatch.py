"""Decides between an op's plain torch specification and its Triton kernel."""

from functools import cache
from importlib.util import find_spec

import torch


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def runs_kernel(tensor: torch.Tensor) -> bool:
    """Whether an op on this tensor goes to its Triton kernel: the tensor is on a GPU and Triton is there."""
    return tensor.is_cuda and _has_triton()
