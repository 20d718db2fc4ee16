"""What training minimises: attention that heads pay to blocks which lie behind others."""

import torch
from torch.nn import functional

from flashmemory_vllm.evaluation.worth import POWER, worth

# Beside the ranking, which knows no absolute values
_ABSOLUTE_SHARE = 0.01
_NO_BLOCK = -1e9


def attention_loss(
    logits: torch.Tensor, shares: torch.Tensor, weights: torch.Tensor, power: float = POWER
) -> torch.Tensor:
    """How far blocks lie behind all others of their selection, each by what it is worth.

    A selection keeps as many blocks as its budget has room for, so it is the order that counts. The loss is the
    cross-entropy between the worth of a selection's blocks and the softmax of their logits (ListNet, ICML 2007), so a
    selection in which little is paid to any block has little say. A small part of binary cross-entropy with the shares
    themselves makes a logit tell a share.

    Args:
        logits: [..., M] of each selection's blocks.
        shares: in [0, 1], largest that any head pays to the block; same shape.
        weights: 0 where there is no block, or one that is resident anyway, else 1; same shape.
        power: of its share that a block is worth.
    """
    worths = worth(shares, power) * weights
    of_all = logits.masked_fill(weights == 0, _NO_BLOCK).log_softmax(-1)
    behind = -(worths * of_all).sum() / worths.sum().clamp(min=torch.finfo(worths.dtype).tiny)
    entropy = functional.binary_cross_entropy_with_logits(logits, shares, reduction="none")
    return behind + _ABSOLUTE_SHARE * (entropy * weights).sum() / weights.sum().clamp(min=1)
