"""Judges an indexer on documents that were kept back: while it trains, for its calibration, and for its card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.worth import worth
from flashmemory_vllm.indexer.forecast_model import HYSTERESIS as FORECAST_HYSTERESIS
from flashmemory_vllm.indexer.neural_model import NeuralIndexer, calibrated
from flashmemory_vllm.training.calibration import fit_platt
from flashmemory_vllm.training.dataset import Document, Schedule, TrainingData
from flashmemory_vllm.training.evaluation import (
    BASELINES,
    HYSTERESIS,
    RATIOS,
    Baseline,
    IndexerScorer,
    Quality,
    Question,
    Scorer,
    ask,
    baseline_scorer,
    evaluate,
    share_scorer,
)
from flashmemory_vllm.training.frame import MAIN_RATIO, frame_of

Columns = dict[str, list[float]]
THRESHOLD = 0.5
KEPT_SHARE = 0.995


class Validation:
    """Questions about the documents kept back.

    Args:
        data: recordings.
        documents: those kept back.
        schedule: when serving selects.
        limit: questions of a document, at most.

    Raises:
        ConfigError: the documents give no question that any candidate answers.
    """

    def __init__(self, data: TrainingData, documents: Sequence[int], schedule: Schedule, limit: int) -> None:
        self._data = data
        self._questions = {number: ask(data.load(number), schedule, limit) for number in documents}
        if not any(one.shares.any() for questions in self._questions.values() for one in questions):
            raise ConfigError(
                f"--data: no recorded token of the validation documents {list(documents)} attends to a block"
            )

    @property
    def num_documents(self) -> int:
        """Documents kept back."""
        return len(self._questions)

    def __len__(self) -> int:
        return sum(map(len, self._questions.values()))

    def run(self, model: NeuralIndexer, rank: int = 0, world_size: int = 1) -> Columns:
        """Recall, mass and what is lost at every ratio, a number for each question.

        Args:
            model: in evaluation mode.
            rank: which process asks.
            world_size: number of processes that share the documents.
        """
        return self._columns(lambda document, _: IndexerScorer(model, document), rank, world_size)

    def run_held(self, model: NeuralIndexer) -> Columns:
        """The same for a forecast as it is served: blocks that are held are worth more."""
        return self._columns(lambda document, _: share_scorer(model, document), 0, 1, FORECAST_HYSTERESIS)

    def run_content(self, model: NeuralIndexer) -> Columns:
        """The same for what a model says without its head."""
        return self._columns(lambda document, _: IndexerScorer(model, document, content_only=True), 0, 1)

    def run_baseline(self, name: Baseline) -> Columns:
        """The same for a selector that needs no training."""
        meta = self._data.meta
        return self._columns(
            lambda document, questions: baseline_scorer(name, document, meta, questions),
            0,
            1,
            HYSTERESIS.get(name, 0.0),
        )

    def run_baselines(self) -> dict[str, Columns]:
        """The same for all of them."""
        return {name: self.run_baseline(name) for name in BASELINES}

    def calibrate(self, model: NeuralIndexer) -> None:
        """Fit the model's probabilities on all candidates that serving could leave out; mutates the model.

        A score is the share that a head is expected to pay. A slot is cheap and a block that is missing is not: so the
        threshold is where blocks above it have `KEPT_SHARE` of what all are worth, if that is less than one half.

        Raises:
            ConfigError: the documents are so short that serving leaves out nothing.
        """
        for content_only in _ways(model):
            logits, shares = self._candidates(model, content_only=content_only)
            if not len(shares):
                raise ConfigError("--data: validation documents have no block beside those that are always resident")
            fitted = _calibration(model, content_only=content_only)
            fitted.copy_(torch.tensor(fit_platt(logits, shares)))
            if shares.any():
                ordered, order = calibrated(logits.to(fitted.device), fitted).cpu().sort(descending=True)
                kept = worth(shares[order]).cumsum(0)
                lowest = float(ordered[int((kept < KEPT_SHARE * kept[-1]).sum())])
                least = min(THRESHOLD, lowest)
                spec = model.spec
                model.spec = replace(spec, threshold=least) if content_only else replace(spec, forecast_threshold=least)

    def threshold_share(self, model: NeuralIndexer) -> tuple[float, float]:
        """Share of the candidates that reach the model's threshold, and what they have of all that any are worth."""
        content_only = model.head is None
        logits, shares = self._candidates(model, content_only=content_only)
        fitted = _calibration(model, content_only=content_only)
        threshold = model.spec.threshold if content_only else model.spec.forecast_threshold
        reaches = calibrated(logits.to(fitted.device), fitted).cpu() >= threshold
        worths = worth(shares)
        return float(reaches.float().mean()), float(worths[reaches].sum() / worths.sum())

    def _candidates(self, model: NeuralIndexer, *, content_only: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and shares of every candidate that is kept for its score alone, over all questions."""
        logits, labels = [], []
        for number, questions in self._questions.items():
            document = self._data.load(number)
            scorer = IndexerScorer(model, document, content_only=content_only)
            for question in questions:
                frame, _ = frame_of(question.num_tokens, document.block_size, MAIN_RATIO)
                free = slice(frame.sink_end, min(frame.recent_start, question.num_candidates))
                shares = torch.from_numpy(question.shares)[free]
                scores = scorer(question.token).cpu()[free]
                logits.append(scores[scores.isfinite()])
                labels.append(shares[scores.isfinite()])
        return torch.cat(logits), torch.cat(labels)

    def _columns(
        self,
        make_scorer: Callable[[Document, Sequence[Question]], Scorer],
        rank: int,
        world_size: int,
        hysteresis: float = 0.0,
    ) -> Columns:
        columns: Columns = {f"{what}@{ratio}": [] for what in Quality._fields for ratio in RATIOS}
        for number in list(self._questions)[rank::world_size]:
            document, questions = self._data.load(number), self._questions[number]
            if not questions:
                continue
            scorer = make_scorer(document, questions)
            for ratio, quality in evaluate(document, questions, scorer, hysteresis=hysteresis):
                for what, value in quality._asdict().items():
                    columns[f"{what}@{ratio}"].append(value)
        return columns


def _ways(model: NeuralIndexer) -> tuple[bool, ...]:
    """Whether content alone counts, of each way to use the model."""
    return (True,) if model.head is None else (True, False)


def _calibration(model: NeuralIndexer, *, content_only: bool) -> torch.Tensor:
    return model.calibration if content_only or model.head is None else model.head.calibration
