"""Selector `neural`: blocks that a trained indexer expects to be needed in the next steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import ClassVar

import torch
from flashmemory_kernels.common.due_rows import Due
from flashmemory_kernels.project_queries import project_queries
from flashmemory_kernels.remember_shares import Channel
from flashmemory_kernels.score_chunks import CODE_DTYPE, quantise_codes, score_chunks

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.indexer.base import IndexGeometry, ScoringRequest, Selector
from flashmemory_vllm.indexer.checkpoint import check_fits, load_indexer, resolve_indexer
from flashmemory_vllm.indexer.neural_model import NORM_EPS, block_logits, ensemble, pooled_keys
from flashmemory_vllm.indexer.places import DueRows, MemoryKind, PlaceState
from flashmemory_vllm.residency.budget import cdiv


@dataclass(frozen=True, slots=True, eq=False)
class _Question:
    """What is kept of a request's question: logits [G, n] that it gave the blocks, and the blocks that it lies in."""

    logits: torch.Tensor
    blocks: slice


class NeuralSelector(Selector):
    """Scores a block by the probability that decode needs it until the next selection (arXiv 2606.09079).

    The index holds one fp8 code and one scale per chunk of a block and anchor layer: `dim + 4` bytes each, whatever the
    number of heads. Codes of blocks never added are uninitialised.

    A request's first selection is made with the newest tokens of its prompt, the question. What they ask for keeps its
    score for the whole request: the answer may take a while to come to it. So do the blocks that the question lies in.

    Args:
        geometry: sizes; anchor layers and heads must be those that the indexer was trained for, and blocks consist of
            its chunks.
        indexer: file, folder or Hugging Face id of a checkpoint. Default: None, which is refused.
        indexer_revision: branch, tag or commit of a Hugging Face repository. Default: None, its main branch.

    Raises:
        ConfigError: there is no such checkpoint, it is damaged, does not fit the model, or a layer group has no
            anchor layer.
    """

    name: ClassVar[str] = "neural"
    needs_queries: ClassVar[bool] = True
    needs_keys: ClassVar[bool] = True

    def __init__(
        self, geometry: IndexGeometry, indexer: str | None = None, indexer_revision: str | None = None
    ) -> None:
        super().__init__(geometry)
        if indexer is None:
            raise ConfigError("selector 'neural' needs the option indexer: a file, a folder or a Hugging Face id")
        self.model = load_indexer(resolve_indexer(indexer, indexer_revision), geometry.device)
        check_fits(self.model.spec, geometry, indexer)
        self.spec = self.model.spec = self.model.spec.at(geometry.block_size)
        self._anchors_of = [
            [anchor for anchor, own in enumerate(geometry.layer_groups) if own == group]
            for group in range(geometry.num_groups)
        ]
        if missing := [group for group, anchors in enumerate(self._anchors_of) if not anchors]:
            raise ConfigError(
                f"indexer {indexer!r} has the anchor layers {list(self.spec.anchor_layers)}: "
                f"layer groups {missing} have none of them"
            )
        size = (len(geometry.anchor_layers), geometry.num_logical_blocks * self.spec.chunks_per_block)
        self.codes = torch.empty(*size, self.spec.dim, dtype=CODE_DTYPE, device=geometry.device)
        self.scales = torch.empty(size, dtype=torch.float32, device=geometry.device)
        self._chunks = torch.arange(self.spec.chunks_per_block, device=geometry.device)
        self._questions: dict[str, _Question] = {}

    @property
    def memory_kind(self) -> MemoryKind:
        """Probabilities by the newest queries, and those by the question, which stay."""
        return MemoryKind((Channel(0.0), Channel(1.0)))

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
        blocks = keys if slots is None else map(torch.Tensor.index_select, keys, repeat(0), slots)
        pooled = [pooled_keys(of_layer, self.spec.chunk_size) for of_layer in blocks]
        codes, scales = quantise_codes(self.model.encode_keys(torch.stack(pooled, dim=1)).transpose(0, 1))
        ids = self._chunk_ids(block_ids)
        # Rows are scattered as bytes: indexing does not know fp8 on every device.
        self.codes.view(torch.uint8).index_copy_(1, ids, codes.contiguous().view(torch.uint8))
        self.scales.index_copy_(1, ids, scales)

    @torch.no_grad()
    def remember(self, due: DueRows, state: PlaceState) -> None:
        """Probability of each block by the newest tokens, and at first what the question makes of it for good."""
        num_queries = int(due.fields[:, Due.NUM_QUERIES].max(initial=0))
        age = torch.arange(num_queries, device=state.queries.device)
        at = (due.on_device[:, Due.POSITION, None] - age) % state.queries.shape[2]
        queries = state.queries[:, due.places[:, None], at].permute(1, 2, 0, 3, 4)  # [n, Q, A, Hq, D]
        heads, gates = self._heads(queries.flatten(0, 1))
        for row in range(len(due)):
            place, num_blocks = due.of_request(row)
            own = slice(row * num_queries, row * num_queries + int(due.fields[row, Due.NUM_QUERIES]))
            ids = self._chunk_ids(state.block_ids[place, :num_blocks].long())
            newest, asked = state.memory[:, :, place, :num_blocks]
            newest.copy_(self.model.probability(self._logits_of(heads[own], gates[own], ids)))
            self._recall_question(due, row, newest, asked)

    def _recall_question(self, due: DueRows, row: int, newest: torch.Tensor, asked: torch.Tensor) -> None:
        """Bring the question's channel [G, n] of a request up to date.

        Args:
            due: the rows that are brought up to date.
            row: the request's.
            newest: probabilities [G, n] by its newest queries, its question at first.
            asked: changed in place.
        """
        if due.fields[row, Due.NUM_KNOWN] == 0:
            asked.copy_(newest)
        else:
            # Nothing was asked of blocks that are newer
            position = torch.arange(asked.shape[1], device=asked.device)
            asked.masked_fill_(position >= due.on_device[row, Due.NUM_KNOWN], 0.0)
        asked[:, self._question_blocks(int(due.prompt_lens[row]))] = 1.0

    @torch.no_grad()
    def score(self, request: ScoringRequest) -> torch.Tensor:
        """Probability of each block, float32 [G, n]; the largest of several tokens'."""
        queries = torch.stack(request.all_queries(self.name))
        logits = self._logits_of(*self._heads(queries), self._chunk_ids(request.block_ids))
        if request.step_index == 0:
            self._questions[request.req_id] = _Question(logits, self._question_blocks(request.prompt_len))
        question = self._questions.get(request.req_id)
        if question is None:
            return self.model.probability(logits)
        known = logits[:, : question.logits.shape[1]]
        torch.maximum(known, question.logits[:, : known.shape[1]], out=known)
        scores = self.model.probability(logits)
        scores[:, question.blocks] = 1.0
        return scores

    def forget(self, req_id: str) -> None:
        """Drop what is kept of a request's question."""
        self._questions.pop(req_id, None)

    def _question_blocks(self, prompt_len: int) -> slice:
        """Blocks that the last tokens of a prompt of so many lie in."""
        size = self.geometry.block_size
        return slice(max(0, prompt_len - self.spec.query_window) // size, cdiv(prompt_len, size))

    def _chunk_ids(self, block_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the index, int64 [n * C], of blocks."""
        return (block_ids.unsqueeze(1) * len(self._chunks) + self._chunks).flatten()

    def _logits_of(self, heads: torch.Tensor, gates: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits [G, n] of blocks, given the index rows of their chunks: the largest of each token's."""
        model = self.model
        of_chunks = score_chunks(heads, gates, self.codes, self.scales, ids, model.bias, model.distance)
        logits = block_logits(of_chunks, self.spec.chunks_per_block, model.reach_offset)  # [Q, A, n]
        if len(self._anchors_of) == 1:
            return ensemble(logits, self.spec.aggregate).amax(0, keepdim=True)
        groups = (torch.stack([logits[:, anchor] for anchor in anchors], dim=1) for anchors in self._anchors_of)
        return torch.stack([ensemble(group, self.spec.aggregate).amax(0) for group in groups])

    def _heads(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Index heads [Q, A, H, E] and gates [Q, A, H] of queries [Q, A, Hq, D].

        Those of one token are made by an op that is bound by reading the weights.
        """
        model = self.model
        if len(queries) > 1:
            return model.encode_queries(queries)
        weights = model.query_down, model.query_norm, model.query_up, model.gate, model.gate_bias
        heads, gates = project_queries(queries[0], model.query_spread, *weights, NORM_EPS)
        return heads.unsqueeze(0), gates.unsqueeze(0)
