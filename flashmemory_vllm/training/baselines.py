"""Selectors that need no training, asked about a recording: what an indexer is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from flashmemory_vllm.evaluation.history import mixed
from flashmemory_vllm.indexer.base import IndexGeometry, Selector
from flashmemory_vllm.indexer.due import DueRequest, due_rows
from flashmemory_vllm.indexer.factory import create_selector
from flashmemory_vllm.indexer.forecast_model import MIX_DECAYS
from flashmemory_vllm.indexer.indexed import IndexedSelector
from flashmemory_vllm.indexer.places import PlaceState
from flashmemory_vllm.training.dataset import DataMeta, Document
from flashmemory_vllm.training.evaluation import Question, Scorer

Baseline = Literal["oracle", "mix", "last", "bounds", "mean", "streaming", "random"]
BASELINES: tuple[Baseline, ...] = ("oracle", "mix", "last", "bounds", "mean", "streaming", "random")
# The bonus of what is held
HYSTERESIS: Mapping[str, float] = {"mix": 1.0}


def baseline_scorer(
    name: Baseline, document: Document, meta: DataMeta, questions: Sequence[Question], device: torch.device
) -> Scorer:
    """A selector that needs no training, or the oracle that ranks by what heads will pay.

    Args:
        name: which.
        document: the recording.
        meta: of the recordings.
        questions: what it will be asked.
        device: where those that read keys do so.
    """
    if name == "oracle":
        shares = {question.token: torch.from_numpy(question.shares) for question in questions}
        return lambda token: shares[token]
    if name in {"mix", "last"}:
        return _shares_scorer(document, meta.query_window, is_mix=name == "mix")
    if name in {"streaming", "random"}:
        device = torch.device("cpu")
    selector = create_selector(name, _geometry(document, meta, device))
    if isinstance(selector, IndexedSelector):
        keys = document.keys.to(device)
        by_block = keys.view(len(keys), document.num_blocks, document.chunks_per_block, *keys.shape[2:])
        largest, smallest, mean = by_block.unbind(4)  # [A, n, C, Hkv, D] each
        is_mean = name == "mean"
        rows = mean.float().mean(2) if is_mean else torch.cat((smallest.amin(2), largest.amax(2)), dim=-1)
        selector.index.copy_(rows.unsqueeze(3))
    return _selector_scorer(selector, document)


def _selector_scorer(selector: Selector, document: Document) -> Scorer:
    """What a selector makes of a document's blocks with the query of a token alone."""
    device = selector.geometry.device
    queries = torch.empty(document.queries.shape[1], 1, 1, *document.queries.shape[2:], device=device)
    block_ids = torch.arange(document.num_blocks, dtype=torch.int32, device=device).unsqueeze(0)
    memory = torch.zeros(1, 1, *block_ids.shape, device=device)
    in_set = torch.zeros(1, *block_ids.shape, dtype=torch.int8, device=device)
    state = PlaceState(queries, block_ids, memory, in_set)

    def score(token: int) -> torch.Tensor:
        num_blocks = document.num_candidates(token)
        queries[:, 0, 0] = document.queries[token]
        selector.remember(due_rows([DueRequest(0, num_blocks, 0, selections=token)], device), state)
        return memory[0, 0, 0, :num_blocks].clone()

    return score


def _shares_scorer(document: Document, query_window: int, *, is_mix: bool) -> Scorer:
    """What the last token paid to blocks, or a mix of what all did, handed on to the next block."""
    memory = document.memory(query_window, MIX_DECAYS if is_mix else (0.0,))
    scores = mixed(memory) if is_mix else memory[:, 0]
    return lambda token: scores[token, : document.num_candidates(token)]


def _geometry(document: Document, meta: DataMeta, device: torch.device) -> IndexGeometry:
    return IndexGeometry(
        num_logical_blocks=document.num_blocks,
        block_size=meta.block_size,
        num_query_heads=meta.num_query_heads,
        num_kv_heads=meta.num_kv_heads,
        head_dim=meta.head_dim,
        softmax_scale=meta.softmax_scale,
        anchor_layers=meta.anchor_layers,
        layer_groups=(0,) * len(meta.anchor_layers),
        num_groups=1,
        dtype=torch.float32,
        device=device,
    )
