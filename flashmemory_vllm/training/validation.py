"""Judges an indexer on documents that were kept back: while it trains, for its calibration, and for its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.worth import worth
from flashmemory_vllm.indexer.forecast_model import HYSTERESIS as FORECAST_HYSTERESIS
from flashmemory_vllm.indexer.neural_model import NeuralIndexer, calibrated
from flashmemory_vllm.training.baselines import BASELINES, HYSTERESIS, Baseline, baseline_scorer
from flashmemory_vllm.training.calibration import fit_platt
from flashmemory_vllm.training.dataset import Document, Schedule, TrainingData
from flashmemory_vllm.training.evaluation import (
    RATIOS,
    IndexerScorer,
    Quality,
    Scorer,
    ask,
    evaluate,
)
from flashmemory_vllm.training.frame import MAIN_RATIO, frame_of

Columns = dict[str, list[float]]
THRESHOLD = 0.5
KEPT_SHARE = 0.995
# Of each document, by its number, and each token that asks: float32 [n] on the CPU
Scores = Mapping[int, Mapping[int, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Answers:
    """Logits that a model gives to the candidates of every question.

    Attributes:
        whole: with its head, if it has one.
        content: without.
    """

    whole: dict[int, Mapping[int, torch.Tensor]]
    content: dict[int, Mapping[int, torch.Tensor]]


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
        return self.judge(self.answers(model, rank, world_size).whole)

    def answers(self, model: NeuralIndexer, rank: int = 0, world_size: int = 1) -> Answers:
        """What a model says; of a whole document's questions it is moved at once.

        Args:
            model: in evaluation mode.
            rank: which process asks.
            world_size: number of processes that share the documents.
        """
        answers = Answers({}, {})
        for number in list(self._questions)[rank::world_size]:
            tokens = [question.token for question in self._questions[number]]
            scorer = IndexerScorer(model, self._data.load(number))
            both = [scorer.both(token) for token in tokens]
            answers.whole[number] = _moved(tokens, [whole for whole, _ in both])
            answers.content[number] = _moved(tokens, [content for _, content in both])
        return answers

    def judge(self, scores: Scores, hysteresis: float = 0.0) -> Columns:
        """Recall, mass and what is lost at every ratio, a number for each question of the documents that have scores.

        Args:
            scores: of the candidates.
            hysteresis: how much more a block is worth that the set before has.
        """
        columns = _no_columns()
        for number, of_document in scores.items():
            self._judge(number, self._data.load(number), of_document.__getitem__, hysteresis, columns)
        return columns

    def run_held(self, model: NeuralIndexer, answers: Answers) -> Columns:
        """The same for a forecast as it is served: blocks that are held are worth more."""
        fitted = _calibration(model, content_only=False).cpu()
        shares = {
            number: {token: calibrated(logits, fitted) for token, logits in of_document.items()}
            for number, of_document in answers.whole.items()
        }
        return self.judge(shares, FORECAST_HYSTERESIS)

    def run_baselines(self, device: torch.device, names: Sequence[Baseline] = BASELINES) -> dict[str, Columns]:
        """The same for selectors that need no training.

        Args:
            device: where those that read keys do so.
            names: which.
        """
        columns: dict[str, Columns] = {name: _no_columns() for name in names}
        for number, questions in self._questions.items():
            document = self._data.load(number)
            for name in names:
                scorer = baseline_scorer(name, document, self._data.meta, questions, device)
                self._judge(number, document, scorer, HYSTERESIS.get(name, 0.0), columns[name])
        return columns

    def calibrate(self, model: NeuralIndexer, answers: Answers) -> None:
        """Fit the model's probabilities on all candidates that serving could leave out; mutates the model.

        A score is the share that a head is expected to pay. A slot is cheap and a block that is missing is not: so the
        threshold is where blocks above it have `KEPT_SHARE` of what all are worth, if that is less than one half.

        Args:
            model: to be calibrated.
            answers: what it says to every question.

        Raises:
            ConfigError: the documents are so short that serving leaves out nothing.
        """
        for content_only in _ways(model):
            logits, shares = self._candidates(answers.content if content_only else answers.whole)
            if not len(shares):
                raise ConfigError("--data: validation documents have no block beside those that are always resident")
            fitted = _calibration(model, content_only=content_only)
            fitted.copy_(torch.tensor(fit_platt(logits, shares)))
            if shares.any():
                ordered, order = calibrated(logits, fitted.cpu()).sort(descending=True)
                kept = worth(shares[order]).cumsum(0)
                lowest = float(ordered[int((kept < KEPT_SHARE * kept[-1]).sum())])
                least = min(THRESHOLD, lowest)
                spec = model.spec
                model.spec = replace(spec, threshold=least) if content_only else replace(spec, forecast_threshold=least)

    def threshold_share(self, model: NeuralIndexer, answers: Answers) -> tuple[float, float]:
        """Share of the candidates that reach the model's threshold, and what they have of all that any are worth."""
        logits, shares = self._candidates(answers.whole)
        threshold = model.spec.threshold if model.head is None else model.spec.forecast_threshold
        reaches = calibrated(logits, _calibration(model, content_only=False).cpu()) >= threshold
        worths = worth(shares)
        return float(reaches.float().mean()), float(worths[reaches].sum() / worths.sum())

    def _candidates(self, scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and shares of every candidate that is kept for its score alone, over all questions."""
        logits, labels = [], []
        for number, questions in self._questions.items():
            block_size = self._data.meta.block_size
            for question in questions:
                frame, _ = frame_of(question.num_tokens, block_size, MAIN_RATIO)
                free = slice(frame.sink_end, min(frame.recent_start, question.num_candidates))
                shares, of_free = torch.from_numpy(question.shares)[free], scores[number][question.token][free]
                logits.append(of_free[of_free.isfinite()])
                labels.append(shares[of_free.isfinite()])
        return torch.cat(logits), torch.cat(labels)

    def _judge(self, number: int, document: Document, scorer: Scorer, hysteresis: float, columns: Columns) -> None:
        """Add a number for each question of a document to its columns."""
        for ratio, quality in evaluate(document, self._questions[number], scorer, hysteresis=hysteresis):
            for what, value in quality._asdict().items():
                columns[f"{what}@{ratio}"].append(value)


def _no_columns() -> Columns:
    return {f"{what}@{ratio}": [] for what in Quality._fields for ratio in RATIOS}


def _moved(tokens: Sequence[int], logits: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Logits of each token, moved to the CPU together."""
    if not tokens:
        return {}
    parts = torch.cat(list(logits)).cpu().split_with_sizes([len(part) for part in logits])
    return dict(zip(tokens, parts, strict=True))


def _ways(model: NeuralIndexer) -> tuple[bool, ...]:
    """Whether content alone counts, of each way to use the model."""
    return (True,) if model.head is None else (True, False)


def _calibration(model: NeuralIndexer, *, content_only: bool) -> torch.Tensor:
    return model.calibration if content_only or model.head is None else model.head.calibration
