"""Which selections a training step sees, and what it asks the model about them. Everything follows from the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.indexer.forecast_model import with_neighbours
from flashmemory_vllm.training.dataset import Document, Schedule, TrainingData
from flashmemory_vllm.training.frame import MAIN_RATIO, frame_of
from flashmemory_vllm.training.ragged import FloatArray, IntArray

MAX_POSITIVES = 512
# Other blocks of a document, for each that any of its selections would best have, and at least
NEGATIVES_PER_POSITIVE = 3
MIN_NEGATIVES = 128
_OPEN_DOCUMENTS = 64


class Batch(NamedTuple):
    """Inputs of `NeuralIndexer.forward` for N documents, and what is wanted of their selections.

    The first W of a document's Q queries are those of its question, which make its first selection; each of the others
    makes a later one: S = 1 + Q - W selections.

    Attributes:
        queries: [N, Q, A, Hq, D].
        pooled: [N, M, R + C, A, Hkv, 3, D].
        distance: float32 [N, Q, M].
        labels: float32 [N, S, M], largest share that any head pays to the block while the selection is in force.
        weights: float32 [N, S, M], 0 where there is no block to choose.
        memory: float32 [N, S, M, 3, C], what is remembered when a selection is made, see `forecast_model.Seen`.
    """

    queries: torch.Tensor
    pooled: torch.Tensor
    distance: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    memory: torch.Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How documents become samples.

    Attributes:
        documents: documents of a step and rank, N.
        tokens: later selections of each, those of its opening steps not counted.
        query_window: queries of a first selection, W.
        reach: chunks R of the block before.
        schedule: when serving selects.
        decays: of the channels of the memory.
        seed: seed of order, tokens and negatives.
        rank: this process.
        world_size: number of processes; each sees other documents.
    """

    documents: int
    tokens: int
    query_window: int
    reach: int
    schedule: Schedule
    decays: tuple[float, ...]
    seed: int
    rank: int = 0
    world_size: int = 1


class TrainingSteps(Dataset[Batch]):
    """The batch of each step of a whole run; item `step` is the same however the run got there.

    Args:
        data: recordings.
        documents: those to train on.
        sampling: how.

    Raises:
        ConfigError: there are not enough documents for one step.
    """

    def __init__(self, data: TrainingData, documents: Sequence[int], sampling: Sampling) -> None:
        self.sampling = sampling
        self._data = data
        self._documents = np.asarray(documents)
        at_once = sampling.documents * sampling.world_size
        if len(documents) < at_once:
            raise ConfigError(
                f"--batch: a step takes {at_once} documents and --data has {len(documents)} to train on; "
                f"allowed is at most that"
            )
        self.steps_per_epoch = len(documents) // at_once
        # A bound method's cache, so that documents are forgotten with this object
        self._load = lru_cache(_OPEN_DOCUMENTS)(self._open)
        self._epoch = lru_cache(1)(self._plan_epoch)

    def __getitem__(self, step: int) -> Batch:
        """Make the batch of a step."""
        sampling = self.sampling
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first = (step_in_epoch * sampling.world_size + sampling.rank) * sampling.documents
        generator = np.random.default_rng([sampling.seed, step, sampling.rank])
        numbers = self._epoch(epoch)[first : first + sampling.documents].tolist()
        parts = [self._sample(*self._load(number), generator) for number in numbers]
        queries, *others = ([part[place][0] for part in parts] for place in range(len(Batch._fields)))
        dims = (0 if name == "pooled" else 1 for name in Batch._fields[1:])
        return Batch(torch.stack(queries), *map(_padded, others, dims))

    def _plan_epoch(self, epoch: int) -> IntArray:
        """All documents in random order."""
        order: IntArray = np.random.default_rng([self.sampling.seed, epoch]).permutation(self._documents)
        return order

    def _open(self, number: int) -> tuple[Document, torch.Tensor]:
        """A document, and what is remembered after each of its tokens, [T, C, N]."""
        document = self._data.load(number)
        return document, document.memory(self.sampling.query_window, self.sampling.decays)

    def _sample(self, document: Document, memory: torch.Tensor, generator: np.random.Generator) -> Batch:
        """A batch of one document."""
        sampling = self.sampling
        usable = later_tokens(document, sampling.schedule)
        num_opening = sampling.schedule.opening_steps
        tokens = np.zeros(num_opening + sampling.tokens, np.int64)
        if len(usable):
            # Those of a document that ends sooner, or was not recorded token by token, come up again
            tokens[:num_opening] = np.resize(usable[:num_opening], num_opening)
            tokens[num_opening:] = generator.choice(usable, sampling.tokens)
        asked = [_wanted(document, token, sampling) for token in (0, *tokens.tolist())]
        frees = [free for _, _, free in asked]
        blocks = _draw_blocks([best for _, best, _ in asked], frees, generator)
        width = int(blocks.max()) + 1
        labels = np.stack([np.pad(shares, (0, max(0, width - len(shares))))[blocks] for shares, _, _ in asked])
        weights = np.stack([(blocks >= free.start) & (blocks < free.stop) for free in frees])
        kept = document.question_blocks(sampling.query_window)
        weights &= (blocks < kept.start) | (blocks >= kept.stop)
        if not len(usable):
            weights[1:] = False
        question = document.question(sampling.query_window)
        candidates = np.array([document.num_candidates(token) for token in (*[0] * len(question), *tokens.tolist())])
        return Batch(
            queries=torch.cat((question, document.queries[torch.from_numpy(tokens)])).unsqueeze(0),
            pooled=document.chunks(torch.from_numpy(blocks), sampling.reach).unsqueeze(0),
            distance=torch.from_numpy((candidates[:, None] - blocks) * document.chunks_per_block).float().unsqueeze(0),
            labels=torch.from_numpy(labels).float().unsqueeze(0),
            weights=torch.from_numpy(weights).float().unsqueeze(0),
            memory=with_neighbours(memory[[0, *tokens.tolist()]])[:, torch.from_numpy(blocks)].unsqueeze(0),
        )


def later_tokens(document: Document, schedule: Schedule) -> IntArray:
    """Recorded tokens but the first that have a recorded token in the window that a selection of theirs is for."""
    first, end = document.windows(schedule)
    usable = np.flatnonzero(first < end)
    return usable[usable > 0]


def _wanted(document: Document, token: int, sampling: Sampling) -> tuple[FloatArray, IntArray, slice]:
    """What heads pay to the candidates, the best of those there is a choice of within the budget, and that choice."""
    shares = document.largest_shares(token, sampling.schedule)
    frame, budget = frame_of(int(document.positions[token]) + 1, document.block_size, MAIN_RATIO)
    stop = min(frame.recent_start, document.num_candidates(token))
    free = slice(frame.sink_end, max(frame.sink_end, stop))
    room = max(0, budget - frame.sink_end - (frame.num_blocks - frame.recent_start))
    best = free.start + np.argsort(-shares[free], kind="stable")[:room]
    return shares, best[shares[best] > 0], free


def _draw_blocks(best: Sequence[IntArray], free: Sequence[slice], generator: np.random.Generator) -> IntArray:
    """The best of each selection, and some of the rest; at least one block, so that there is something to stack."""
    first, stop = min(part.start for part in free), max(part.stop for part in free)
    positives = np.unique(np.concatenate(best))
    if len(positives) > MAX_POSITIVES:
        positives = generator.choice(positives, MAX_POSITIVES, replace=False)
    others = np.setdiff1d(np.arange(first, stop), positives)
    wanted = max(MIN_NEGATIVES, NEGATIVES_PER_POSITIVE * len(positives))
    if len(others) > wanted:
        others = generator.choice(others, wanted, replace=False)
    blocks = np.concatenate((positives, others)).astype(np.int64)
    return blocks if len(blocks) else np.zeros(1, np.int64)


def _padded(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Tensors of one document each as one, padded with zeros along the blocks, which are one of their dims."""
    return pad_sequence([part.movedim(dim, 0) for part in parts], batch_first=True).movedim(1, dim + 1)
