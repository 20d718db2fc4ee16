"""From log-mass per query head and anchor layer to one score per layer group and block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from flashmemory_vllm.errors import ConfigError

Aggregate = Literal["max", "mean"]


def check_aggregate(aggregate: str) -> None:
    """Raise ConfigError unless `aggregate` is known."""
    if aggregate not in get_args(Aggregate):
        raise ConfigError(f"aggregate must be one of {', '.join(get_args(Aggregate))}; got {aggregate!r}")


def aggregate_mass(
    log_mass: Sequence[torch.Tensor], layer_groups: Sequence[int], num_groups: int, aggregate: Aggregate
) -> torch.Tensor:
    """Normalise each head's log-mass over the blocks, then combine the heads and layers of each group.

    Raw logits are never combined: a head with large norms would decide alone, while shares of a softmax are
    comparable. With "max" a block that one head concentrates on wins even when the other heads are diffuse;
    their mean would drown it, and such a head is how a model retrieves.

    Args:
        log_mass: per anchor layer float32 [Hq, n]; -inf excludes a block.
        layer_groups: layer group of each anchor layer.
        num_groups: G; each group has an anchor layer.
        aggregate: how heads and layers are combined.

    Returns:
        float32 [G, n], shares in 0..1.
    """
    groups = []
    for group in range(num_groups):
        # A head that sees no block at all (every one excluded) has NaN shares: they count 0.
        shares = torch.cat([m.softmax(-1) for m, g in zip(log_mass, layer_groups, strict=True) if g == group])
        shares = torch.nan_to_num(shares, nan=0.0)
        groups.append(shares.amax(0) if aggregate == "max" else shares.mean(0))
    return torch.stack(groups)
