"""How what several layers or heads say becomes one number."""

from typing import Literal

import torch

Aggregate = Literal["max", "mean"]


def aggregated(values: torch.Tensor, aggregate: Aggregate, dim: int) -> torch.Tensor:
    """The largest of the values along a dim, or their mean."""
    return values.amax(dim) if aggregate == "max" else values.mean(dim)
