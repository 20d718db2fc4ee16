"""An indexer over a training batch: logits of selections instead of queries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from flashmemory_kernels.common import aggregated
from flashmemory_kernels.forecast_blocks import Seen
from torch import nn

from flashmemory_vllm.indexer.neural_model import NeuralIndexer
from flashmemory_vllm.training.batches import Batch


class Logits(NamedTuple):
    """What an indexer says of the blocks of each selection, [N, S, M].

    Attributes:
        content: by what the blocks hold.
        forecast: by that and by what heads paid to them; None without a head.
    """

    content: torch.Tensor
    forecast: torch.Tensor | None


class Selections(nn.Module):
    """Applies an indexer to batches, in one forward pass that several processes can share gradients of.

    Args:
        model: the indexer.
    """

    def __init__(self, model: NeuralIndexer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Logits:
        """Logits of all selections of a batch."""
        model, window = self.model, self.model.spec.query_window
        by_layer = model(batch.queries, batch.pooled, batch.distance).float()
        content = by_selection(aggregated(by_layer, model.spec.aggregate, -2), window)
        if model.head is None:
            return Logits(content, None)
        is_first = torch.arange(content.shape[1], device=content.device).unsqueeze(1) == 0
        distance = torch.cat((batch.distance[:, :1], batch.distance[:, window:]), dim=1) * model.spec.chunk_size
        # The question asked nothing of blocks that are newer
        asked = torch.where(batch.distance[:, :1] > 0, content[:, :1], content)
        seen = Seen(batch.memory, content, asked, distance, is_first)
        return Logits(content, model.head(seen))


def by_selection(logits: torch.Tensor, query_window: int) -> torch.Tensor:
    """Logits of selections [..., S, M] of those of queries [..., Q, M]: the first takes the best of the question's."""
    first = logits[..., :query_window, :].amax(-2, keepdim=True)
    return torch.cat((first, logits[..., query_window:, :]), dim=-2)
