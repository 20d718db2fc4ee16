"""Specification and CPU path of `summarise_keys`."""

import torch


def _bounds(keys: torch.Tensor) -> torch.Tensor:
    return torch.cat((keys.amin(dim=2, keepdim=True), keys.amax(dim=2, keepdim=True)), dim=-1)


def _mean(keys: torch.Tensor) -> torch.Tensor:
    return keys.mean(dim=2, keepdim=True, dtype=torch.float32)


def _exact(keys: torch.Tensor) -> torch.Tensor:
    return keys


_SUMMARIES = {"bounds": _bounds, "mean": _mean, "exact": _exact}


def summarise_keys_naive(
    keys: torch.Tensor, slots: torch.Tensor | None, index: torch.Tensor, block_ids: torch.Tensor, kind: str
) -> None:
    """See `op.summarise_keys`."""
    rows = _SUMMARIES[kind](keys if slots is None else keys.index_select(0, slots))
    index.index_copy_(0, block_ids, rows.to(index.dtype))
