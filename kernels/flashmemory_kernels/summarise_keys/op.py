"""Public op `summarise_keys`."""

from typing import Literal

import torch

from flashmemory_kernels.common import expect_shape
from flashmemory_kernels.summarise_keys.naive import bound_keys_naive, mean_keys_naive

_SUMMARIES = {"mean": mean_keys_naive, "bounds": bound_keys_naive}


def summarise_keys(keys: torch.Tensor, kind: Literal["mean", "bounds"]) -> torch.Tensor:
    """Summarise the keys of n full blocks.

    Args:
        keys: [n, Hkv, T, D], T > 0 tokens of a block, any strides.
        kind: "mean", or "bounds" for the per-channel minimum and maximum (Quest, arXiv 2406.10774).

    Returns:
        [n, Hkv, 1, D] for "mean", [n, Hkv, 2, D] (minimum first) for "bounds", in the dtype of `keys`.

    Raises:
        ValueError: `keys` is not [n, Hkv, T, D] with T > 0, or the kind is unknown.
    """
    expect_shape("keys", keys, (None, None, None, None))
    if keys.shape[2] == 0:
        raise ValueError(f"keys: expected at least one token per block, got shape {list(keys.shape)}")
    if kind not in _SUMMARIES:
        raise ValueError(f"kind: expected one of {sorted(_SUMMARIES)}, got {kind!r}")
    return _SUMMARIES[kind](keys)
