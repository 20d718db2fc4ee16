"""Makes the share to expect of a logit: Platt scaling on validation documents."""

from __future__ import annotations

from math import exp

import torch
from torch.nn import functional

_MAX_STEPS = 100


@torch.enable_grad()
def fit_platt(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Slope and offset for which `sigmoid(slope * logit + offset)` is the mean of the label.

    Maximum likelihood with the smoothed targets of Platt (1999), so that separable labels have a finite answer.
    The slope is positive: calibration never changes which of two blocks is better.

    Args:
        logits: [n], those of all candidates, not of a sample with another share of positives.
        labels: [n] in [0, 1].
    """
    x, positive = logits.double(), labels.double()
    num_positive = float(positive.sum())
    high, low = (num_positive + 1) / (num_positive + 2), 1 / (len(labels) - num_positive + 2)
    targets = low + (high - low) * positive
    # Logits of unit spread, so that one step length fits any scale
    center, spread = x.mean(), x.std(correction=0).clamp(min=1e-9)
    x = (x - center) / spread
    log_slope = torch.zeros((), dtype=torch.float64, requires_grad=True)
    offset = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_slope, offset], max_iter=_MAX_STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = functional.binary_cross_entropy_with_logits(log_slope.exp() * x + offset, targets)
        torch.autograd.backward(value)
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    slope = exp(log_slope.item()) / spread.item()
    return slope, offset.item() - slope * center.item()
