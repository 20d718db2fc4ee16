"""Which tokens a training step sees, and what it asks the model about them. Everything follows from the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.training.dataset import Document, IntArray, TrainingData

NEGATIVES_PER_POSITIVE = 3
MAX_POSITIVES = 512
# Also of a token that needs nothing.
MIN_NEGATIVES = 16
TRIVIAL_WEIGHT = 0.5
# Documents whose tokens are mixed in one step: their blocks are encoded once for all of its tokens.
DOCUMENTS_PER_STEP = 4
_OPEN_DOCUMENTS = 64


class Batch(NamedTuple):
    """Inputs of `NeuralIndexer.forward` for B tokens with up to K blocks each, and what is wanted of them.

    Attributes:
        queries: [B, A, Hq, D].
        pooled: [M, A, Hkv, 3, D].
        rows: int64 [B, K], blocks as rows of `pooled`.
        distance: float32 [B, K].
        labels: float32 [B, K], 1 where the block is needed.
        weights: float32 [B, K], 0 where there is no block.
    """

    queries: torch.Tensor
    pooled: torch.Tensor
    rows: torch.Tensor
    distance: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor


class _Samples(NamedTuple):
    """Blocks asked about for one token: ids, labels and weights, [k] each."""

    blocks: IntArray
    labels: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens become samples.

    Attributes:
        tokens_per_step: tokens of a step and rank, B.
        tau: steps for which a selection is in force.
        delay: steps from a query to the step before its selection is in force.
        seed: seed of order and negatives.
        rank: this process.
        world_size: number of processes; each sees other tokens.
    """

    tokens_per_step: int
    tau: int
    delay: int
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
        ConfigError: there are not enough tokens for one step.
    """

    def __init__(self, data: TrainingData, documents: Sequence[int], sampling: Sampling) -> None:
        self.sampling = sampling
        self._data = data
        self._tokens = {n: usable_tokens(data.load(n), sampling.tau, sampling.delay) for n in documents}
        self._chunk = max(1, sampling.tokens_per_step // DOCUMENTS_PER_STEP)
        num_chunks = sum(-(-len(tokens) // self._chunk) for tokens in self._tokens.values())
        if num_chunks < DOCUMENTS_PER_STEP * sampling.world_size:
            raise ConfigError(
                f"--data has too few recorded tokens to train on: {sum(map(len, self._tokens.values()))} in "
                f"{len(documents)} documents do not make one step of {sampling.tokens_per_step} for each process"
            )
        self.steps_per_epoch = num_chunks // (DOCUMENTS_PER_STEP * sampling.world_size)
        # A bound method's cache, so that documents are forgotten with this object
        self._load = lru_cache(_OPEN_DOCUMENTS)(self._load_document)
        self._epoch = lru_cache(1)(self._plan_epoch)

    def __getitem__(self, step: int) -> Batch:
        """Make the batch of a step."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        chunks = self._epoch(epoch)
        first = (step_in_epoch * self.sampling.world_size + self.sampling.rank) * DOCUMENTS_PER_STEP
        generator = np.random.default_rng([self.sampling.seed, step, self.sampling.rank])
        return self._collate(chunks[first : first + DOCUMENTS_PER_STEP], generator)

    def _load_document(self, number: int) -> tuple[Document, np.ndarray]:
        document = self._data.load(number)
        return document, document.trivial_blocks()

    def _plan_epoch(self, epoch: int) -> list[tuple[int, IntArray]]:
        """Chunks of each document's tokens, all in random order: document and its token numbers."""
        generator = np.random.default_rng([self.sampling.seed, epoch])
        chunks = []
        for number, usable in self._tokens.items():
            tokens = generator.permutation(usable)
            chunks += [(number, tokens[start : start + self._chunk]) for start in range(0, len(tokens), self._chunk)]
        order = generator.permutation(len(chunks))
        return [chunks[place] for place in order]

    def _collate(self, chunks: Sequence[tuple[int, IntArray]], generator: np.random.Generator) -> Batch:
        queries, pooled, rows, distances, samples = [], [], [], [], []
        offset = 0
        for number, tokens in chunks:
            document, trivial = self._load(number)
            asked = [self._sample(document, trivial, int(token), generator) for token in tokens]
            used, places = np.unique(np.concatenate([one.blocks for one in asked]), return_inverse=True)
            ends = np.cumsum([len(one.blocks) for one in asked])
            rows += np.split(places + offset, ends[:-1])
            distances += [document.num_candidates(int(t)) - one.blocks for t, one in zip(tokens, asked, strict=True)]
            samples += asked
            queries.append(document.queries[torch.from_numpy(tokens)])
            pooled.append(document.keys[:, torch.from_numpy(used)].transpose(0, 1))
            offset += len(used)
        return Batch(
            queries=torch.cat(queries),
            pooled=torch.cat(pooled),
            rows=torch.from_numpy(_padded(rows, np.int64, 0)),
            distance=torch.from_numpy(_padded(distances, np.float32, 1)),
            labels=torch.from_numpy(_padded([one.labels for one in samples], np.float32, 0)),
            weights=torch.from_numpy(_padded([one.weights for one in samples], np.float32, 0)),
        )

    def _sample(self, document: Document, trivial: np.ndarray, token: int, generator: np.random.Generator) -> _Samples:
        num_candidates = document.num_candidates(token)
        window = document.window(token, self.sampling.tau, self.sampling.delay)
        needed = document.golden.union(*window, num_candidates)
        is_needed = np.zeros(num_candidates, np.bool_)
        is_needed[needed] = True
        if len(needed) > MAX_POSITIVES:
            needed = generator.choice(needed, MAX_POSITIVES, replace=False)
        others = np.flatnonzero(~is_needed)
        num_others = min(len(others), max(MIN_NEGATIVES, NEGATIVES_PER_POSITIVE * len(needed)))
        others = generator.choice(others, num_others, replace=False)
        labels = np.repeat([1.0, 0.0], [len(needed), num_others])
        blocks = np.concatenate((needed, others))
        weights = np.where((labels > 0) & trivial[blocks], TRIVIAL_WEIGHT, 1.0)
        return _Samples(blocks, labels, weights)


def usable_tokens(document: Document, tau: int, delay: int) -> IntArray:
    """Recorded tokens that have candidates and a window with at least one recorded token."""
    first, end = np.searchsorted(document.positions, document.positions + delay + np.array([[1], [tau + 1]]))
    return np.flatnonzero((first < end) & (document.positions >= document.block_size))


def _padded(rows: Sequence[np.ndarray], dtype: type[np.generic], filler: int) -> np.ndarray:
    """Rows of different lengths as one array."""
    array = np.full((len(rows), max(map(len, rows))), filler, dtype)
    for line, row in zip(array, rows, strict=True):
        line[: len(row)] = row
    return array
