"""Selector `neural`: blocks that a trained indexer expects to be needed in the next steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import ClassVar

import torch
from flashmemory_kernels.common.due_rows import Due
from flashmemory_kernels.forecast_blocks import NOT_ASKED, NUM_OTHERS
from flashmemory_kernels.project_queries import project_queries
from flashmemory_kernels.remember_shares import Channel
from flashmemory_kernels.score_chunks import CODE_DTYPE, quantise_codes, score_chunks

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.indexer.base import IndexGeometry, Selector
from flashmemory_vllm.indexer.checkpoint import check_fits, load_indexer, resolve_indexer
from flashmemory_vllm.indexer.forecast import Forecast
from flashmemory_vllm.indexer.neural_model import pooled_keys
from flashmemory_vllm.indexer.places import DueRows, MemoryKind, PlaceState
from flashmemory_vllm.own_options import IndexDtype

# Tokens whose index heads are held at once; 3 MB for an 8B model
MOST_TOKENS = 64


class NeuralSelector(Selector):
    """Scores a block by the probability that decode needs it until the next selection (arXiv 2606.09079).

    The index holds one fp8 code and one scale per chunk of a block and anchor layer: `dim + 4` bytes each, whatever the
    number of heads. Codes of blocks never added are uninitialised.

    A request's first selection is made with the newest tokens of its prompt, the question. What they ask for keeps its
    score for the whole request: the answer may take a while to come to it. So do the blocks that the question lies in.

    A checkpoint with a head forecasts: what the blocks hold is one part of it, what every token paid to them another
    (`forecast_model.py`). Then the index holds exact keys as well, and the memory a channel for each decay.

    Args:
        geometry: sizes; anchor layers and heads must be those that the indexer was trained for, and blocks consist of
            its chunks.
        indexer: file, folder or Hugging Face id of a checkpoint. Default: None, which is refused.
        indexer_revision: branch, tag or commit of a Hugging Face repository. Default: None, its main branch.
        index_dtype: how exact keys are kept, see `ExactSelector`. Default: "auto".

    Raises:
        ConfigError: there is no such checkpoint, it is damaged, does not fit the model, or a layer group has no
            anchor layer.
    """

    name: ClassVar[str] = "neural"
    is_finite: ClassVar[bool] = True
    needs_queries: ClassVar[bool] = True
    needs_keys: ClassVar[bool] = True

    def __init__(
        self,
        geometry: IndexGeometry,
        indexer: str | None = None,
        indexer_revision: str | None = None,
        index_dtype: IndexDtype = "auto",
    ) -> None:
        super().__init__(geometry)
        if indexer is None:
            raise ConfigError("selector 'neural' needs the option indexer: a file, a folder or a Hugging Face id")
        self.model = load_indexer(resolve_indexer(indexer, indexer_revision), geometry.device)
        check_fits(self.model.spec, geometry, indexer)
        self.spec = self.model.spec = self.model.spec.at(geometry.block_size)
        if missing := sorted(set(range(geometry.num_groups)) - set(geometry.layer_groups)):
            raise ConfigError(
                f"indexer {indexer!r} has the anchor layers {list(self.spec.anchor_layers)}: "
                f"layer groups {missing} have none of them"
            )
        groups = torch.tensor(geometry.layer_groups, dtype=torch.int32, device=geometry.device)
        self._ensemble = self.model.ensemble(groups)
        size = (len(geometry.anchor_layers), geometry.num_logical_blocks, self.spec.chunks_per_block)
        self.codes = torch.empty(*size, self.spec.dim, dtype=CODE_DTYPE, device=geometry.device)
        self.scales = torch.empty(size, dtype=torch.float32, device=geometry.device)
        head = self.model.head
        self._forecast = None if head is None else Forecast(head, geometry, index_dtype)

    @property
    def memory_kind(self) -> MemoryKind:
        """What a head forecasts; without one probabilities by the newest queries, and by the question, which stay."""
        return MemoryKind((Channel(0.0), Channel(1.0))) if self._forecast is None else self._forecast.memory_kind

    @property
    def score_threshold(self) -> float:
        """Score from which the checkpoint's calibration says that a block is worth a slot."""
        return self.spec.threshold if self._forecast is None else self.spec.forecast_threshold

    def bytes_per_block(self) -> int:
        """Device bytes of index keys per logical block, all anchor layers together."""
        return self.spec.bytes_per_block + (0 if self._forecast is None else self._forecast.keys.bytes_per_block())

    @torch.no_grad()
    def add_blocks(
        self, block_ids: torch.Tensor, keys: Sequence[torch.Tensor], slots: Sequence[torch.Tensor] | None = None
    ) -> None:
        """Encode blocks that became full; see `Selector.add_blocks`."""
        if self._forecast is not None:
            self._forecast.keys.add_blocks(block_ids, keys, slots)
        blocks = keys if slots is None else map(torch.Tensor.index_select, keys, repeat(0), slots)
        pooled = [pooled_keys(of_layer, self.spec.chunk_size) for of_layer in blocks]
        by_chunk = self.model.encode_keys(torch.stack(pooled, dim=1)).transpose(0, 1)  # [A, n * C, E]
        codes, scales = quantise_codes(by_chunk.reshape(len(by_chunk), len(block_ids), self.spec.chunks_per_block, -1))
        # Rows are scattered as bytes: indexing does not know fp8 on every device.
        self.codes.view(torch.uint8).index_copy_(1, block_ids, codes.contiguous().view(torch.uint8))
        self.scales.index_copy_(1, block_ids, scales)

    @torch.no_grad()
    def remember(self, due: DueRows, state: PlaceState) -> None:
        """Forecast, or probability of each block by the newest tokens and what the question makes of it for good."""
        if self._forecast is not None:
            due = self._forecast.remember_shares(due, state)
        places, is_forecast = due.places, self._forecast is not None
        newest, asked = state.memory[-NUM_OTHERS:-1] if is_forecast else state.memory
        self._score(due, state, newest)
        known, position = due.on_device[:, Due.NUM_KNOWN, None], torch.arange(asked.shape[2], device=asked.device)
        by_newest = newest[:, places]
        if not is_forecast:
            newest[:, places] = by_newest = self.model.probability(by_newest)
        # Nothing was asked of blocks that are newer
        before = torch.where(position < known, asked[:, places], NOT_ASKED if is_forecast else 0.0)
        asked[:, places] = torch.where(known == 0, by_newest, before)
        if self._forecast is not None:
            self._forecast.make(due, state)
        # What is kept for good where there is no forecast, and otherwise whatever that says
        result = state.memory[-1]
        result[:, places] = result[:, places].masked_fill(self._in_question(due, position), 1.0)

    def _score(self, due: DueRows, state: PlaceState, logits: torch.Tensor) -> None:
        """Write logits [G, P, W] of the blocks of all rows: by the whole question, later by the newest query."""
        most = int(due.fields[:, Due.NUM_QUERIES].max(initial=0)) if due.is_entering else 1
        age = torch.arange(most, device=state.queries.device)
        size = max(1, MOST_TOKENS // max(1, most))
        for start in range(0, len(due), size):
            rows, places = due.on_device[start : start + size], due.places[start : start + size]
            at = (rows[:, Due.POSITION, None] - age) % state.queries.shape[2]
            queries = state.queries[:, places[:, None], at].permute(1, 2, 0, 3, 4)  # [n, Q, A, Hq, D]
            heads, gates = project_queries(queries.flatten(0, 1), *self.model.query_weights)
            heads, gates = (part.view(*queries.shape[:2], *part.shape[1:]) for part in (heads, gates))
            score_chunks(heads, gates, self.codes, self.scales, state.block_ids, rows, self._ensemble, logits)

    def _in_question(self, due: DueRows, position: torch.Tensor) -> torch.Tensor:
        """Whether the last tokens of each row's prompt lie in the block at a position, [n, W]."""
        size, prompt_lens = self.geometry.block_size, due.prompt_lens.unsqueeze(1)
        first = (prompt_lens - self.spec.query_window).clamp(min=0) // size
        return (position >= first) & (position * size < prompt_lens)
