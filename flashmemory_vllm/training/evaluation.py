"""How much of what decode needs a selector keeps, over all candidates and with the blocks that serving forces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from flashmemory_kernels.score_chunks import quantise_codes, score_chunks

from flashmemory_vllm.indexer.base import IndexGeometry, ScoringRequest
from flashmemory_vllm.indexer.factory import create_selector
from flashmemory_vllm.indexer.indexed import IndexedSelector
from flashmemory_vllm.indexer.neural_model import NeuralIndexer, ensemble
from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.residency.ranking import Frame
from flashmemory_vllm.training.batches import usable_tokens
from flashmemory_vllm.training.dataset import DataMeta, Document, FloatArray, IntArray

RATIOS = (0.10, 0.135, 0.15)
# The ratio that a training run is stopped and judged by.
MAIN_RATIO = 0.135
# As the options of the same names are by default.
SINK_TOKENS = 64
RECENT_TOKENS = 256
Baseline = Literal["bounds", "mean", "streaming", "random", "oracle"]
BASELINES: tuple[Baseline, ...] = ("oracle", "bounds", "mean", "streaming", "random")

# Scores of the candidates of one recorded token, float32 [n]
Scorer = Callable[[int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Question:
    """A recorded token at which blocks are selected.

    Attributes:
        token: its number in the document.
        num_candidates: n, full blocks at that token.
        num_tokens: tokens of the request, this one included.
        needed: int64, candidates that any token needs while the set is in force.
        mass: float32 [n or more], attention mass of each block over those tokens.
    """

    token: int
    num_candidates: int
    num_tokens: int
    needed: IntArray
    mass: FloatArray


class Quality(NamedTuple):
    """What one set is worth.

    Attributes:
        recall: share of the needed candidates that the set has.
        mass: share of the attention mass that falls on the set and on blocks newer than it.
    """

    recall: float
    mass: float


def ask(document: Document, tau: int, delay: int, limit: int) -> list[Question]:
    """Questions at evenly spaced tokens of a document.

    Args:
        document: the recording.
        tau: steps for which a selection is in force.
        delay: steps from a query to the step before its selection is in force.
        limit: how many, at most.
    """
    usable = usable_tokens(document, tau, delay)
    picked = usable[np.unique(np.linspace(0, len(usable) - 1, min(limit, len(usable))).round().astype(np.int64))]
    questions = []
    for token in picked.tolist():
        window = document.window(token, tau, delay)
        num_candidates = document.num_candidates(token)
        needed = document.golden.union(*window, num_candidates)
        mass = document.mass.sums(*window, num_candidates)
        questions.append(Question(token, num_candidates, int(document.positions[token]) + 1, needed, mass))
    return questions


def frame_of(question: Question, block_size: int, ratio: float) -> tuple[Frame, int]:
    """The blocks that serving forces into the set of a question, and the set's budget."""
    policy = BudgetPolicy(
        block_size=block_size,
        resident_ratio=ratio,
        min_sparse_tokens=0,
        sink_tokens=SINK_TOKENS,
        recent_tokens=RECENT_TOKENS,
        max_num_batched_tokens=1,
        max_model_len=question.num_tokens,
        growth_reserve_tokens=0,
    )
    num_blocks = -(-question.num_tokens // block_size)
    recent_start = num_blocks - policy.recent_blocks(question.num_tokens)
    frame = Frame(policy.sink_blocks(question.num_tokens), recent_start, num_blocks)
    return frame, policy.decode_budget(question.num_tokens)


def judge(document: Document, question: Question, scores: torch.Tensor, ratio: float) -> Quality:
    """What a selection by these scores keeps; recall is NaN if nothing is needed."""
    frame, budget = frame_of(question, document.block_size, ratio)
    kept = np.zeros(frame.num_blocks, np.bool_)
    kept[frame.with_best(frame.candidates(), scores.cpu().numpy(), budget)] = True
    recall = float(kept[question.needed].mean()) if len(question.needed) else float("nan")
    old, total = question.mass[: question.num_candidates], float(question.mass.sum())
    newer = total - float(old.sum())
    mass = (float(old[kept[: question.num_candidates]].sum()) + newer) / total if total else float("nan")
    return Quality(recall, mass)


class IndexerScorer:
    """Logits of an indexer for one document, through the codes and the op that serving uses.

    Args:
        model: in evaluation mode.
        document: the recording.
    """

    def __init__(self, model: NeuralIndexer, document: Document) -> None:
        self._model, self._document = model, document
        self._device = model.bias.device
        with torch.no_grad():
            pooled = document.keys.transpose(0, 1).to(self._device)
            self._codes, self._scales = quantise_codes(model.encode_keys(pooled).transpose(0, 1).contiguous())

    @torch.no_grad()
    def __call__(self, token: int) -> torch.Tensor:
        """Logits of the ensemble, float32 [n]."""
        num_candidates = self._document.num_candidates(token)
        ids = torch.arange(num_candidates, device=self._device)
        model = self._model
        heads, gates = model.encode_queries(self._document.queries[token].unsqueeze(0).to(self._device))
        logits = score_chunks(heads[0], gates[0], self._codes, self._scales, ids, model.bias, model.distance)
        return ensemble(logits, model.spec.aggregate)


def baseline_scorer(name: Baseline, document: Document, meta: DataMeta, questions: Sequence[Question]) -> Scorer:
    """A selector that needs no training, or the oracle that ranks by the attention to come."""
    if name == "oracle":
        masses = {question.token: torch.from_numpy(question.mass) for question in questions}
        return lambda token: masses[token][: document.num_candidates(token)]
    selector = create_selector(name, _geometry(document, meta))
    if isinstance(selector, IndexedSelector):
        largest, smallest, mean = document.keys.float().unbind(3)  # [A, n, Hkv, D] each
        rows = torch.cat((smallest, largest), dim=-1) if name == "bounds" else mean
        selector.index.copy_(rows.unsqueeze(3))

    def score(token: int) -> torch.Tensor:
        ids = torch.arange(document.num_candidates(token))
        return selector.score(ScoringRequest("", ids, document.queries[token].float(), token))[0]

    return score


def evaluate(
    document: Document, questions: Sequence[Question], scorer: Scorer, ratios: Sequence[float] = RATIOS
) -> Iterator[tuple[float, Quality]]:
    """Judge a scorer at every question and ratio of a document."""
    for question in questions:
        scores = scorer(question.token)
        for ratio in ratios:
            yield ratio, judge(document, question, scores, ratio)


def _geometry(document: Document, meta: DataMeta) -> IndexGeometry:
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
        device=torch.device("cpu"),
    )
