"""What a training run may choose, and the indexer that follows from it."""

from __future__ import annotations

from dataclasses import dataclass

from flashmemory_kernels.common import Aggregate

from flashmemory_vllm.evaluation.worth import POWER
from flashmemory_vllm.indexer.neural_model import IndexerSpec
from flashmemory_vllm.training.dataset import Schedule, TrainingData
from flashmemory_vllm.training.validation import THRESHOLD

# The last token, some tokens, and all since the question
DECAYS = (0.0, 0.7, 0.9, 0.98, 0.99, 1.0)


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What a training run may choose; see `flashmemory train --help`.

    Attributes:
        epochs: passes over the documents.
        lr: peak learning rate.
        batch: documents of a step, of all processes together.
        tokens: tokens drawn from each document's answer, beside its question.
        rank: width of the query bottleneck; 0 is what `dim` has for each query head.
        heads: index heads; 0 is one for each query head.
        dim: elements of a chunk's code.
        reach: chunks at the end of a block that speak for the next one, too.
        query_window: newest prompt tokens that a first selection is made with.
        opening_steps: decode steps that each end with a selection that is in force in the next one.
        aggregate: how the layers' logits become one.
        tau: decode steps for which a selection is in force.
        delay: steps from a query to the step before its selection is in force.
        decays: of the channels of the memory that a forecast reads; none: content is all it knows.
        power: of its largest share that a block is worth in the loss.
        seed: seed of weights, split, order and negatives.
        validation_share: share of the documents that is kept back.
        validate_every: steps between two validations; 0 is half an epoch.
        patience: validations without a better recall after which training ends.
        questions: validation tokens of a document, at most.
        save_every: steps between two saved states.
    """

    epochs: int = 4
    lr: float = 1.5e-4
    batch: int = 4
    tokens: int = 8
    rank: int = 0
    heads: int = 0
    dim: int = 128
    reach: int = 2
    query_window: int = 16
    opening_steps: int = 2
    aggregate: Aggregate = "max"
    tau: int = 16
    delay: int = 1
    decays: tuple[float, ...] = DECAYS
    power: float = POWER
    seed: int = 0
    validation_share: float = 0.1
    validate_every: int = 0
    patience: int = 6
    questions: int = 32
    save_every: int = 500

    @property
    def schedule(self) -> Schedule:
        """When serving is to select."""
        return Schedule(self.tau, self.delay, self.opening_steps)


def make_spec(data: TrainingData, settings: TrainSettings) -> IndexerSpec:
    """The indexer that these settings make for the recorded model."""
    meta = data.meta
    shape = ("model", "num_layers", "num_query_heads", "num_kv_heads", "head_dim", "block_size", "chunk_size")
    width = max(1, min(settings.dim // meta.num_kv_heads, meta.head_dim))
    return IndexerSpec(
        **{name: getattr(meta, name) for name in shape},
        anchor_layers=meta.anchor_layers,
        reach=min(settings.reach, meta.block_size // meta.chunk_size),
        query_window=settings.query_window,
        opening_steps=settings.opening_steps,
        rank=settings.rank or meta.num_query_heads * width,
        num_heads=settings.heads or meta.num_query_heads,
        dim=settings.dim,
        aggregate=settings.aggregate,
        threshold=THRESHOLD,
        tau=settings.tau,
        delay=settings.delay,
        data=data.meta.digest,
        memory_decays=settings.decays,
        forecast_threshold=THRESHOLD,
    )
