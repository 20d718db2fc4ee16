"""Specification and CPU path of `copy_pages`."""

import torch


def copy_pages_naive(
    source: torch.Tensor,
    source_ids: torch.Tensor | None,
    target: torch.Tensor,
    target_ids: torch.Tensor | None,
) -> None:
    """See `op.copy_pages`."""
    if source_ids is None:
        assert target_ids is not None
        target.index_copy_(0, target_ids, source[: len(target_ids)])
    elif target_ids is not None:
        target.index_copy_(0, target_ids, source.index_select(0, source_ids))
    elif target.is_contiguous():
        # Into a staging buffer without a temporary.
        torch.index_select(source, 0, source_ids, out=target[: len(source_ids)])
    else:
        target[: len(source_ids)] = source.index_select(0, source_ids)
