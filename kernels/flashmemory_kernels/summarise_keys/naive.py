"""Specification and CPU path of `summarise_keys`."""

import torch

from flashmemory_kernels.score_chunks.naive import quantise_codes


def _bounds(keys: torch.Tensor) -> torch.Tensor:
    return torch.cat((keys.amin(dim=2, keepdim=True), keys.amax(dim=2, keepdim=True)), dim=-1)


def _mean(keys: torch.Tensor) -> torch.Tensor:
    return keys.mean(dim=2, keepdim=True, dtype=torch.float32)


def _exact(keys: torch.Tensor) -> torch.Tensor:
    return keys


_SUMMARIES = {"bounds": _bounds, "mean": _mean, "exact": _exact}


def summarise_keys_naive(
    keys: torch.Tensor,
    slots: torch.Tensor | None,
    index: torch.Tensor,
    block_ids: torch.Tensor,
    kind: str,
    scales: torch.Tensor | None = None,
) -> None:
    """See `op.summarise_keys`."""
    gathered = keys if slots is None else keys.index_select(0, slots)
    if scales is not None:
        codes, block_scales = quantise_codes(gathered.flatten(2))
        # Scattered as bytes: indexing does not know fp8 on every device.
        index.view(torch.uint8).index_copy_(0, block_ids, codes.view(gathered.shape).view(torch.uint8))
        scales.index_copy_(0, block_ids, block_scales)
        return
    rows = _SUMMARIES[kind](gathered)
    index.index_copy_(0, block_ids, rows.to(index.dtype))
