"""How much of what decode attends to a selector keeps, over all candidates and with the blocks that serving forces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from flashmemory_kernels.forecast_blocks import Seen
from flashmemory_kernels.project_queries import project_queries
from flashmemory_kernels.score_chunks import quantise_codes, score_chunks

from flashmemory_vllm.evaluation.history import mixed
from flashmemory_vllm.evaluation.worth import worth
from flashmemory_vllm.indexer.base import IndexGeometry, Selector
from flashmemory_vllm.indexer.due import DueRequest, due_rows
from flashmemory_vllm.indexer.factory import create_selector
from flashmemory_vllm.indexer.forecast_model import MIX_DECAYS, with_neighbours
from flashmemory_vllm.indexer.indexed import IndexedSelector
from flashmemory_vllm.indexer.neural_model import NeuralIndexer, calibrated
from flashmemory_vllm.indexer.places import PlaceState
from flashmemory_vllm.residency.ranking import best
from flashmemory_vllm.training.batches import later_tokens
from flashmemory_vllm.training.dataset import DataMeta, Document, Schedule
from flashmemory_vllm.training.frame import MAIN_RATIO, frame_of
from flashmemory_vllm.training.ragged import FloatArray, IntArray

RATIOS = (0.10, MAIN_RATIO, 0.15)
Baseline = Literal["oracle", "mix", "last", "bounds", "mean", "streaming", "random"]
BASELINES: tuple[Baseline, ...] = ("oracle", "mix", "last", "bounds", "mean", "streaming", "random")
# The bonus of what is held
HYSTERESIS: Mapping[str, float] = {"mix": 1.0}

BoolArray = npt.NDArray[np.bool_]
# Scores of the candidates of one recorded token, float32 [n]
Scorer = Callable[[int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Question:
    """A recorded token at which blocks are selected.

    Attributes:
        token: its number in the document.
        num_candidates: n, full blocks at that token.
        num_tokens: tokens of the request, this one included.
        shares: float32 [n], largest share that any head pays to a candidate in any token that the selection is for.
        mass: float32 [n or more], attention mass of each block over those tokens.
        paid: of each token that the selection is for, candidates and the largest share that any head pays to each.
    """

    token: int
    num_candidates: int
    num_tokens: int
    shares: FloatArray
    mass: FloatArray
    paid: Sequence[tuple[IntArray, FloatArray]]


class Quality(NamedTuple):
    """What one set is worth.

    Attributes:
        recall: share of what the candidates are worth that the set has, see `evaluation/worth.py`.
        mass: share of the attention mass, mean over all heads, that falls on the set and on blocks newer than it.
        lost: largest share that any head pays to a block that is left out, mean over the tokens in the window.
        fetched: blocks that come into the set, of selections before which there was one.
    """

    recall: float
    mass: float
    lost: float
    fetched: float


def ask(document: Document, schedule: Schedule, limit: int) -> list[Question]:
    """Questions at the tokens at which serving would select: the prompt's last, and every tau steps from there.

    The opening steps' are among them.

    Args:
        document: the recording.
        schedule: when serving selects.
        limit: how many, at most.
    """
    later = later_tokens(document, schedule)
    steps = (document.positions - document.positions[0])[later]
    is_due = (np.diff(steps // schedule.tau, prepend=0) > 0) | (steps <= schedule.opening_steps)
    first, end = document.windows(schedule)
    questions = []
    for token in [0, *later[is_due].tolist()][:limit]:
        num_candidates = document.num_candidates(token)
        shares = document.largest_shares(token, schedule)
        mass = document.mass.sums(int(first[token]), int(end[token]), num_candidates)
        paid = [document.share.row(other, num_candidates) for other in range(int(first[token]), int(end[token]))]
        questions.append(Question(token, num_candidates, int(document.positions[token]) + 1, shares, mass, paid))
    return questions


def choose(document: Document, question: Question, scores: torch.Tensor, ratio: float) -> BoolArray:
    """Whether each block of the request, [N], is in the set that is chosen by scores [num_candidates]."""
    frame, budget = frame_of(question.num_tokens, document.block_size, ratio)
    # Blocks newer than the scoring are better than any other
    value, candidates = np.full(frame.num_blocks, np.inf, np.float32), slice(frame.sink_end, frame.recent_start)
    value[: len(scores)] = scores.cpu().numpy()
    kept = np.ones(frame.num_blocks, np.bool_)
    kept[candidates] = best(value[candidates], budget - frame.num_forced)
    return kept


def judge(question: Question, kept: BoolArray, before: BoolArray | None) -> Quality:
    """What a set keeps; recall is NaN if no candidate is worth anything.

    Args:
        question: what the set is for.
        kept: whether each block is in it, as many as there are candidates or more.
        before: the same of the set before. None if there was none.
    """
    of_candidates = kept[: question.num_candidates]
    worths = worth(question.shares)
    recall = float(worths[of_candidates].sum() / worths.sum()) if worths.any() else float("nan")
    losses = [float(shares[~of_candidates[ids]].max(initial=0.0)) for ids, shares in question.paid]
    old, total = question.mass[: question.num_candidates], float(question.mass.sum())
    newer = total - float(old.sum())
    mass = (float(old[of_candidates].sum()) + newer) / total if total else float("nan")
    fetched = float("nan") if before is None else float((kept[: len(before)] & ~before).sum())
    return Quality(recall, mass, float(np.mean(losses)) if losses else float("nan"), fetched)


class IndexerScorer:
    """Logits of an indexer for one document, through the codes and the op that serving uses.

    Args:
        model: in evaluation mode.
        document: the recording.
        content_only: leave the model's head out.
    """

    def __init__(self, model: NeuralIndexer, document: Document, *, content_only: bool = False) -> None:
        self._model, self._document = model, document
        self._head = None if content_only else model.head
        self._device, spec = model.bias.device, model.spec
        with torch.no_grad():
            pooled = document.keys.transpose(0, 1).to(self._device)
            codes = model.encode_keys(pooled).transpose(0, 1)
            by_block = codes.reshape(len(codes), -1, spec.chunks_per_block, spec.dim).contiguous()  # [A, N, C, E]
            self._codes, self._scales = quantise_codes(by_block)
            self._block_ids = torch.arange(by_block.shape[1], dtype=torch.int32, device=self._device).unsqueeze(0)
            groups = torch.zeros(len(spec.anchor_layers), dtype=torch.int32, device=self._device)
            self._ensemble = model.ensemble(groups)
            question = document.question(spec.query_window)
            self._asked: torch.Tensor = self._logits(question, document.num_candidates(0))
        self._memory = document.memory(spec.query_window, spec.memory_decays if self._head is not None else ())

    @torch.no_grad()
    def __call__(self, token: int) -> torch.Tensor:
        """Logits of the blocks, float32 [n], what the question asked for among them; of its own blocks infinite."""
        asked, newest = self._asked, self._asked
        if token:
            queries = self._document.queries[token].unsqueeze(0)
            newest = self._logits(queries, self._document.num_candidates(token))
            asked = torch.nn.functional.pad(asked, (0, len(newest) - len(asked)), value=-torch.inf)
        head = self._head
        logits = torch.maximum(newest, asked) if head is None else head(self._seen(token, newest, asked))
        if token:
            logits[self._document.question_blocks(self._model.spec.query_window)] = torch.inf
        return logits

    def _seen(self, token: int, newest: torch.Tensor, asked: torch.Tensor) -> Seen:
        num_blocks = len(newest)
        memory = with_neighbours(self._memory[token])[:num_blocks].to(self._device)
        distance = torch.arange(num_blocks, 0, -1, device=self._device) * self._document.block_size
        # Nothing was asked of blocks that are newer: the newest token's is all there is
        known = torch.where(asked.isfinite(), asked, newest)
        return Seen(memory, newest, known, distance, torch.tensor(token == 0, device=self._device))

    def _logits(self, queries: torch.Tensor, num_blocks: int) -> torch.Tensor:
        """Float32 [n], the largest by any of the queries [Q, A, Hq, D]."""
        due = due_rows([DueRequest(0, num_blocks, len(queries) - 1, len(queries))], self._device)
        heads, gates = project_queries(queries.to(self._device), *self._model.query_weights)
        logits = torch.empty(1, *self._block_ids.shape, device=self._device)
        arguments = self._codes, self._scales, self._block_ids, due.on_device, self._ensemble, logits
        score_chunks(heads.unsqueeze(0), gates.unsqueeze(0), *arguments)
        return logits[0, 0, :num_blocks]


def share_scorer(model: NeuralIndexer, document: Document) -> Scorer:
    """The shares that an indexer expects."""
    scorer = IndexerScorer(model, document)
    calibration = model.calibration if model.head is None else model.head.calibration
    return lambda token: calibrated(scorer(token), calibration)


def baseline_scorer(name: Baseline, document: Document, meta: DataMeta, questions: Sequence[Question]) -> Scorer:
    """A selector that needs no training, or the oracle that ranks by what heads will pay."""
    if name == "oracle":
        shares = {question.token: torch.from_numpy(question.shares) for question in questions}
        return lambda token: shares[token]
    if name in {"mix", "last"}:
        return _shares_scorer(document, meta.query_window, is_mix=name == "mix")
    selector = create_selector(name, _geometry(document, meta))
    if isinstance(selector, IndexedSelector):
        keys = document.keys.float()
        by_block = keys.view(len(keys), document.num_blocks, document.chunks_per_block, *keys.shape[2:])
        largest, smallest, mean = by_block.unbind(4)  # [A, n, C, Hkv, D] each
        bounds = torch.cat((smallest.amin(2), largest.amax(2)), dim=-1)
        rows = bounds if name == "bounds" else mean.mean(2)
        selector.index.copy_(rows.unsqueeze(3))

    return _selector_scorer(selector, document)


def _selector_scorer(selector: Selector, document: Document) -> Scorer:
    """What a selector makes of a document's blocks with the query of a token alone."""
    queries = torch.empty(document.queries.shape[1], 1, 1, *document.queries.shape[2:])
    block_ids = torch.arange(document.num_blocks, dtype=torch.int32).unsqueeze(0)
    memory, in_set = torch.zeros(1, 1, *block_ids.shape), torch.zeros(1, *block_ids.shape, dtype=torch.int8)
    state = PlaceState(queries, block_ids, memory, in_set)

    def score(token: int) -> torch.Tensor:
        num_blocks = document.num_candidates(token)
        queries[:, 0, 0] = document.queries[token]
        selector.remember(due_rows([DueRequest(0, num_blocks, 0, selections=token)], queries.device), state)
        return memory[0, 0, 0, :num_blocks].clone()

    return score


def _shares_scorer(document: Document, query_window: int, *, is_mix: bool) -> Scorer:
    """What the last token paid to blocks, or a mix of what all did, handed on to the next block."""
    memory = document.memory(query_window, MIX_DECAYS if is_mix else (0.0,))
    scores = mixed(memory) if is_mix else memory[:, 0]
    return lambda token: scores[token, : document.num_candidates(token)]


def evaluate(
    document: Document,
    questions: Sequence[Question],
    scorer: Scorer,
    ratios: Sequence[float] = RATIOS,
    hysteresis: float = 0.0,
) -> Iterator[tuple[float, Quality]]:
    """Judge a scorer at every question and ratio of a document.

    Args:
        document: the recording.
        questions: in order.
        scorer: scores their candidates.
        ratios: resident blocks over all blocks.
        hysteresis: how much more a block is worth that the set before has.
    """
    held: dict[float, BoolArray] = {}
    for question in questions:
        scores = scorer(question.token)
        for ratio in ratios:
            before = held.get(ratio)
            preferred = scores
            if before is not None and hysteresis:
                known = torch.from_numpy(before[: len(scores)]).to(scores)
                preferred = scores * (1 + hysteresis * torch.nn.functional.pad(known, (0, len(scores) - len(known))))
            held[ratio] = choose(document, question, preferred, ratio)
            yield ratio, judge(question, held[ratio], before)


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
