"""How much of what decode attends to a selector keeps, over all candidates and with the blocks that serving forces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from flashmemory_kernels.forecast_blocks import Seen
from flashmemory_kernels.project_queries import project_queries
from flashmemory_kernels.score_chunks import quantise_codes, score_chunks

from flashmemory_vllm.evaluation.worth import worth
from flashmemory_vllm.indexer.due import DueRequest, due_rows
from flashmemory_vllm.indexer.forecast_model import with_neighbours
from flashmemory_vllm.indexer.neural_model import NeuralIndexer
from flashmemory_vllm.residency.ranking import best
from flashmemory_vllm.training.batches import later_tokens
from flashmemory_vllm.training.dataset import Document, Schedule
from flashmemory_vllm.training.frame import MAIN_RATIO, frame_of
from flashmemory_vllm.training.ragged import FloatArray, IntArray

RATIOS = (0.10, MAIN_RATIO, 0.15)

BoolArray = npt.NDArray[np.bool_]


class Paid(NamedTuple):
    """What some tokens paid to candidates.

    Attributes:
        ids: int64 [n], candidates.
        shares: float32 [n], largest share that any head pays to each.
        tokens: int64 [n], which of the tokens did.
        num_tokens: how many there are, those that paid nothing included.
    """

    ids: IntArray
    shares: FloatArray
    tokens: IntArray
    num_tokens: int

    @classmethod
    def by(cls, rows: Sequence[tuple[IntArray, FloatArray]]) -> Paid:
        """Of rows of candidates and shares, one for each token."""
        ids = np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in rows)])
        shares = np.concatenate([np.empty(0, np.float32), *(shares for _, shares in rows)])
        return cls(ids, shares, np.repeat(np.arange(len(rows)), [len(ids) for ids, _ in rows]), len(rows))


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
        paid: by each token that the selection is for.
    """

    token: int
    num_candidates: int
    num_tokens: int
    shares: FloatArray
    mass: FloatArray
    paid: Paid


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
        num_tokens = int(document.positions[token]) + 1
        questions.append(Question(token, num_candidates, num_tokens, shares, mass, Paid.by(paid)))
    return questions


def choose(document: Document, question: Question, scores: FloatArray, ratio: float) -> BoolArray:
    """Whether each block of the request, [N], is in the set that is chosen by scores [num_candidates]."""
    frame, budget = frame_of(question.num_tokens, document.block_size, ratio)
    # Blocks newer than the scoring are better than any other
    value, candidates = np.full(frame.num_blocks, np.inf, np.float32), slice(frame.sink_end, frame.recent_start)
    value[: len(scores)] = scores
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
    paid, lost = question.paid, np.zeros(question.paid.num_tokens, np.float32)
    is_left = ~of_candidates[paid.ids]
    np.maximum.at(lost, paid.tokens[is_left], paid.shares[is_left])
    old, total = question.mass[: question.num_candidates], float(question.mass.sum())
    newer = total - float(old.sum())
    mass = (float(old[of_candidates].sum()) + newer) / total if total else float("nan")
    fetched = float("nan") if before is None else float((kept[: len(before)] & ~before).sum())
    return Quality(recall, mass, float(lost.mean(dtype=np.float64)) if lost.size else float("nan"), fetched)


class IndexerScorer:
    """Logits of an indexer for one document, through the codes and the op that serving uses.

    Args:
        model: in evaluation mode.
        document: the recording.
    """

    def __init__(self, model: NeuralIndexer, document: Document) -> None:
        self._model, self._document = model, document
        self._device, spec = model.bias.device, model.spec
        with torch.no_grad():
            # As they lie: to put them in another order is the device's work
            pooled = document.keys.to(self._device).transpose(0, 1)
            codes = model.encode_keys(pooled).transpose(0, 1)
            by_block = codes.reshape(len(codes), -1, spec.chunks_per_block, spec.dim).contiguous()  # [A, N, C, E]
            self._codes, self._scales = quantise_codes(by_block)
            self._block_ids = torch.arange(by_block.shape[1], dtype=torch.int32, device=self._device).unsqueeze(0)
            groups = torch.zeros(len(spec.anchor_layers), dtype=torch.int32, device=self._device)
            self._ensemble = model.ensemble(groups)
            question = document.question(spec.query_window)
            self._asked: torch.Tensor = self._logits(question, document.num_candidates(0))
        if model.head is not None:
            self._memory = document.memory(spec.query_window, spec.memory_decays).to(self._device)

    def __call__(self, token: int) -> torch.Tensor:
        """Logits of the blocks, float32 [n], what the question asked for among them; of its own blocks infinite."""
        return self.both(token)[0]

    @torch.no_grad()
    def both(self, token: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, and what it says without its head: of content alone."""
        asked, newest = self._asked, self._asked
        if token:
            queries = self._document.queries[token].unsqueeze(0)
            newest = self._logits(queries, self._document.num_candidates(token))
            asked = torch.nn.functional.pad(asked, (0, len(newest) - len(asked)), value=-torch.inf)
        content, head = torch.maximum(newest, asked), self._model.head
        whole = content if head is None else head(self._seen(token, newest, asked))
        if token:
            for logits in (whole, content):
                logits[self._document.question_blocks(self._model.spec.query_window)] = torch.inf
        return whole, content

    def _seen(self, token: int, newest: torch.Tensor, asked: torch.Tensor) -> Seen:
        num_blocks = len(newest)
        memory = with_neighbours(self._memory[token])[:num_blocks]
        distance = torch.arange(num_blocks, 0, -1, device=self._device) * self._document.block_size
        # Nothing was asked of blocks that are newer: the newest token's is all there is
        known = torch.where(asked.isfinite(), asked, newest)
        return Seen(memory, newest, known, distance, torch.full((), token == 0, device=self._device))

    def _logits(self, queries: torch.Tensor, num_blocks: int) -> torch.Tensor:
        """Float32 [n], the largest by any of the queries [Q, A, Hq, D]."""
        due = due_rows([DueRequest(0, num_blocks, len(queries) - 1, len(queries))], self._device)
        heads, gates = project_queries(queries.to(self._device), *self._model.query_weights)
        logits = torch.empty(1, *self._block_ids.shape, device=self._device)
        arguments = self._codes, self._scales, self._block_ids, due.on_device, self._ensemble, logits
        score_chunks(heads.unsqueeze(0), gates.unsqueeze(0), *arguments)
        return logits[0, 0, :num_blocks]


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
        scores: FloatArray = scorer(question.token).cpu().numpy()
        for ratio in ratios:
            before, preferred = held.get(ratio), scores
            if before is not None and hysteresis:
                bonus = np.zeros(len(scores), np.float32)
                bonus[: len(before)] = hysteresis * before[: len(scores)]
                preferred = scores * (1 + bonus)
            held[ratio] = choose(document, question, preferred, ratio)
            yield ratio, judge(question, held[ratio], before)
