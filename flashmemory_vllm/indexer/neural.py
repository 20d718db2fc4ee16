"""Selector `neural`: blocks that a trained indexer expects to be needed in the next steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import ClassVar

import torch
from flashmemory_kernels.project_queries import project_queries
from flashmemory_kernels.score_chunks import CODE_DTYPE, quantise_codes, score_chunks
from flashmemory_kernels.summarise_keys import summarise_keys

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.indexer.base import IndexGeometry, ScoringRequest, Selector
from flashmemory_vllm.indexer.checkpoint import check_fits, load_indexer, resolve_indexer
from flashmemory_vllm.indexer.neural_model import NORM_EPS, ensemble


class NeuralSelector(Selector):
    """Scores a block by the probability that decode needs it until the next selection (arXiv 2606.09079).

    The index holds one fp8 code and one scale per block and anchor layer: `dim + 4` bytes each, whatever the number
    of heads. Codes of blocks never added are uninitialised.

    Args:
        geometry: sizes; anchor layers and heads must be those that the indexer was trained for.
        indexer: file, folder or Hugging Face id of a checkpoint. Default: None, which is refused.

    Raises:
        ConfigError: there is no such checkpoint, it is damaged, does not fit the model, or a layer group has no
            anchor layer.
    """

    name: ClassVar[str] = "neural"
    needs_queries: ClassVar[bool] = True
    needs_keys: ClassVar[bool] = True

    def __init__(self, geometry: IndexGeometry, indexer: str | None = None) -> None:
        super().__init__(geometry)
        if indexer is None:
            raise ConfigError("selector 'neural' needs the option indexer: a file, a folder or a Hugging Face id")
        self.model = load_indexer(resolve_indexer(indexer), geometry.device)
        self.spec = self.model.spec
        check_fits(self.spec, geometry, indexer)
        self._anchors_of = [
            [anchor for anchor, own in enumerate(geometry.layer_groups) if own == group]
            for group in range(geometry.num_groups)
        ]
        if missing := [group for group, anchors in enumerate(self._anchors_of) if not anchors]:
            raise ConfigError(
                f"indexer {indexer!r} has the anchor layers {list(self.spec.anchor_layers)}: "
                f"layer groups {missing} have none of them"
            )
        size = (len(geometry.anchor_layers), geometry.num_logical_blocks)
        self.codes = torch.empty(*size, self.spec.dim, dtype=CODE_DTYPE, device=geometry.device)
        self.scales = torch.empty(size, dtype=torch.float32, device=geometry.device)

    @property
    def score_threshold(self) -> float:
        """Score from which the checkpoint's calibration says that a block is worth a slot."""
        return self.spec.threshold

    def bytes_per_block(self) -> int:
        """Device bytes of index keys per logical block, all anchor layers together."""
        return self.spec.bytes_per_block

    @torch.no_grad()
    def add_blocks(
        self, block_ids: torch.Tensor, keys: Sequence[torch.Tensor], slots: Sequence[torch.Tensor] | None = None
    ) -> None:
        """Encode blocks that became full; see `Selector.add_blocks`."""
        layer_slots = repeat(None, len(keys)) if slots is None else slots
        pooled = [
            self._pool(pages, in_slots, len(block_ids))
            for pages, in_slots in zip(keys, layer_slots, strict=slots is not None)
        ]
        codes, scales = quantise_codes(self.model.encode_keys(torch.stack(pooled, dim=1)).transpose(0, 1))
        # Rows are scattered as bytes: indexing does not know fp8 on every device.
        self.codes.view(torch.uint8).index_copy_(1, block_ids, codes.contiguous().view(torch.uint8))
        self.scales.index_copy_(1, block_ids, scales)

    @torch.no_grad()
    def score(self, request: ScoringRequest) -> torch.Tensor:
        """Probability of each block, float32 [G, n]; the largest of several tokens'."""
        last, *earlier = (self._logits(queries, request.block_ids) for queries in request.all_queries(self.name))
        for logits in earlier:
            torch.maximum(last, logits, out=last)
        return self.model.probability(last)

    def _logits(self, queries: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Combined logits [G, n] of blocks for queries [A, Hq, D]."""
        model = self.model
        weights = model.query_down, model.query_norm, model.query_up, model.gate, model.gate_bias
        heads, gates = project_queries(queries, model.query_spread, *weights, NORM_EPS)
        logits = score_chunks(heads, gates, self.codes, self.scales, ids, model.bias, model.distance)
        if len(self._anchors_of) == 1:
            return ensemble(logits, self.spec.aggregate).unsqueeze(0)
        groups = (torch.stack([logits[anchor] for anchor in anchors]) for anchors in self._anchors_of)
        return torch.stack([ensemble(group, self.spec.aggregate) for group in groups])

    def _pool(self, pages: torch.Tensor, slots: torch.Tensor | None, num_blocks: int) -> torch.Tensor:
        """Maximum, minimum and mean of each block's keys, float32 [n, Hkv, 3, D]."""
        _, num_heads, _, head_dim = pages.shape
        rows = torch.arange(num_blocks, device=pages.device)
        bounds = torch.empty(num_blocks, num_heads, 1, 2 * head_dim, device=pages.device)
        mean = torch.empty(num_blocks, num_heads, 1, head_dim, device=pages.device)
        summarise_keys(pages, slots, bounds, rows, "bounds")
        summarise_keys(pages, slots, mean, rows, "mean")
        smallest, largest = bounds.chunk(2, dim=-1)
        return torch.cat((largest, smallest, mean), dim=2)
