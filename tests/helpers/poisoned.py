"""Memory that `torch.empty` and its kin give out, poisoned: what a kernel forgets to write is no lucky zero."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch

# Every function of torch that gives out memory as it finds it.
GIVES_MEMORY: tuple[tuple[object, str], ...] = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with bytes 0xFF: NaN in every float format, -1 in integers, true in booleans."""
    if tensor.device.type != "meta" and tensor.numel():
        tensor.new_tensor([], dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(0xFF)
    return tensor


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Poison what is allocated inside without a value."""
    with ExitStack() as patches:
        for owner, name in GIVES_MEMORY:
            patches.enter_context(patch.object(owner, name, _poisoning(getattr(owner, name))))
        yield


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(allocate)
    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        return poison(allocate(*args, **kwargs))

    return allocate_poisoned
