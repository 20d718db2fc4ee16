"""What training minimises: how far needed blocks lie behind blocks that nobody needs."""

import torch
from torch.nn import functional

# Beside the ranking, which knows no absolute values
_ABSOLUTE_SHARE = 0.01
_NOT_A_RIVAL = -1e9
FOCAL_GAMMA = 2


def rank_loss(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean over the needed blocks of how far each lies behind all blocks of its selection that are not needed.

    A selection keeps as many blocks as its budget has room for, so it is the order that counts. Each needed block is
    put to a softmax against all others together: `-log(exp(l) / (exp(l) + sum of exp of the others))`. A small share of
    binary cross-entropy holds the logits at a scale that can be calibrated.

    Args:
        logits: [..., M] of each selection's blocks.
        labels: 1 where a block is needed, else 0; same shape.
        weights: 0 where there is no block, or one that is resident anyway; same shape.
    """
    is_needed, is_other = labels * weights, (1 - labels) * weights
    rivals = logits.masked_fill(is_other == 0, _NOT_A_RIVAL).logsumexp(-1, keepdim=True)
    behind = functional.softplus(rivals - logits)
    entropy = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    absolute = (entropy * weights).sum() / weights.sum().clamp(min=1)
    return (behind * is_needed).sum() / is_needed.sum().clamp(min=1) + _ABSOLUTE_SHARE * absolute


def focal_loss(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean of the focal loss with gamma 2 (arXiv 1708.02002), all tensors of one shape."""
    entropy = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    # exp(-entropy) is the probability given to the right label
    return ((1 - torch.exp(-entropy)) ** FOCAL_GAMMA * entropy * weights).sum() / weights.sum().clamp(min=1)
