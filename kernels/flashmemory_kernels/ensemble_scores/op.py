"""Public op `ensemble_scores`."""

from typing import Literal, get_args

import torch

from flashmemory_kernels.common import expect_device, expect_dtype, expect_shape, runs_kernel
from flashmemory_kernels.ensemble_scores.naive import ensemble_scores_naive

Aggregate = Literal["max", "mean"]


def ensemble_scores(
    mass: torch.Tensor, layer_groups: torch.Tensor, num_groups: int, aggregate: Aggregate
) -> torch.Tensor:
    """Normalise each head's log-mass over the blocks, then combine the heads and layers of each group.

    Raw logits are never combined: a head with large norms would decide alone, while shares of a softmax are
    comparable. With "max" a block that one head concentrates on wins even when the other heads are diffuse;
    their mean would drown it, and such a head is how a model retrieves.

    Args:
        mass: float32 [A, Hq, n], log-mass of each block; -inf excludes a block. A head that sees no block at
            all has no share in any.
        layer_groups: int32 [A], layer group of each layer, trusted: each of the G groups has a layer.
        num_groups: G.
        aggregate: how heads and layers are combined.

    Returns:
        float32 [G, n], shares in 0..1.

    Raises:
        ValueError: shape, dtype, device or strides do not match, or `aggregate` is unknown.
    """
    expect_shape("mass", mass, (None, None, None))
    expect_dtype("mass", mass, torch.float32)
    expect_shape("layer_groups", layer_groups, (len(mass),))
    expect_dtype("layer_groups", layer_groups, torch.int32)
    expect_device("layer_groups", layer_groups, mass.device)
    if aggregate not in get_args(Aggregate):
        raise ValueError(f"aggregate: expected one of {list(get_args(Aggregate))}, got {aggregate!r}")
    if not mass.is_contiguous():
        raise ValueError(f"mass: expected a contiguous tensor, got strides {mass.stride()}")
    if runs_kernel(mass):
        from flashmemory_kernels.ensemble_scores.kernel import ensemble_scores_triton

        return ensemble_scores_triton(mass, layer_groups, num_groups, aggregate)
    return ensemble_scores_naive(mass, layer_groups, num_groups, aggregate)
