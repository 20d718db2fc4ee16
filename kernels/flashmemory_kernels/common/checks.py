"""Argument checks of the public ops; every message names the tensor, what is expected and what came."""

import torch


def expect_shape(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `tensor` has this shape; None accepts any size."""
    given = tensor.shape
    is_right = len(given) == len(shape)
    # A loop, as each launch has several of these and a generator takes twice as long
    for want, got in zip(shape, given, strict=False):
        if want is not None and want != got:
            is_right = False
    if not is_right:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(given)}")


def expect_dtype(name: str, tensor: torch.Tensor, *dtypes: torch.dtype) -> None:
    """Raise ValueError unless `tensor` has one of these dtypes."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {tensor.dtype}")


def expect_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Raise ValueError unless `tensor` lies on this device."""
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def expect_contiguous_rows(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless the elements of the last dim lie side by side."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: expected a last dim of stride 1, got strides {tensor.stride()}")
