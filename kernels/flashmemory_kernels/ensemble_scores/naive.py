"""Specification and CPU path of `ensemble_scores`."""

import torch


def ensemble_scores_naive(
    mass: torch.Tensor, layer_groups: torch.Tensor, num_groups: int, aggregate: str
) -> torch.Tensor:
    """See `op.ensemble_scores`."""
    # A head that sees no block at all (every one excluded) has NaN shares: they count 0.
    shares = mass.softmax(-1).nan_to_num_(nan=0.0)
    groups = []
    for group in range(num_groups):
        members = shares[layer_groups == group].flatten(0, 1)
        groups.append(members.amax(0) if aggregate == "max" else members.mean(0))
    return torch.stack(groups)
