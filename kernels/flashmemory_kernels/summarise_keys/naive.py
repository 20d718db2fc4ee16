"""Specification and CPU path of `summarise_keys`; torch reductions are also what runs on the GPU."""

import torch


def mean_keys_naive(keys: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens, formed in float32: [n, Hkv, T, D] -> [n, Hkv, 1, D]."""
    return keys.mean(dim=2, keepdim=True, dtype=torch.float32).to(keys.dtype)


def bound_keys_naive(keys: torch.Tensor) -> torch.Tensor:
    """Smallest and largest value of each channel: [n, Hkv, T, D] -> [n, Hkv, 2, D]; exact in every dtype."""
    return torch.stack((keys.amin(dim=2), keys.amax(dim=2)), dim=2)
