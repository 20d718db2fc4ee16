"""Trains a neural indexer on recorded attention, in one process or several."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.files import whole_file
from flashmemory_vllm.indexer.neural_model import NeuralIndexer
from flashmemory_vllm.training.batches import Batch, Sampling, TrainingSteps
from flashmemory_vllm.training.dataset import TrainingData, split_documents
from flashmemory_vllm.training.frame import MAIN_RATIO
from flashmemory_vllm.training.losses import attention_loss
from flashmemory_vllm.training.processes import Processes
from flashmemory_vllm.training.selections import Logits, Selections
from flashmemory_vllm.training.settings import TrainSettings, make_spec
from flashmemory_vllm.training.start import calibrate_layers, start_from_data
from flashmemory_vllm.training.validation import Validation

WEIGHT_DECAY = 0.01
WARMUP_SHARE = 0.03
MAX_GRAD_NORM = 1.0
# Of the loss of first selections and of those of the opening, which most answers depend on
LATER_SHARE = 0.5
# Offsets of logits have to go as far as logits do, of which a weight is a small part
OFFSET_SPEED = 50
# A head is small and sees features of about one
HEAD_SPEED = 20
_OFFSETS = ("bias", "distance", "reach_offset")
# What the first logits are calibrated on
_FIRST_BATCHES = 8


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The best model of a run and how it came about.

    Attributes:
        model: with the weights of the best validation, not calibrated.
        history: a row for each validation, the untrained model's first.
        steps: steps taken.
        minutes: wall-clock of training, resumed parts included.
        train_documents: how many documents it learnt from.
    """

    model: NeuralIndexer
    history: list[dict[str, float]]
    steps: int
    minutes: float
    train_documents: int


def learning_rate_share(step: int, num_steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to zero."""
    num_warmup = max(1, round(WARMUP_SHARE * num_steps))
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup)))


class Trainer:
    """Model, optimiser and data of one run.

    A batch follows from the seed and its step alone, so a saved state needs no state of random generators.

    Args:
        data: recordings.
        settings: choices.
        state: file of the saved state.
        processes: this process among those that train together.
        device: where to train.
        report: takes lines for the user; called in the first process only.

    Raises:
        ConfigError: there is too little data.
    """

    def __init__(
        self,
        data: TrainingData,
        settings: TrainSettings,
        state: Path,
        processes: Processes,
        device: torch.device,
        report: Callable[[str], None],
    ) -> None:
        self.settings, self.device, self.processes = settings, device, processes
        self._state, self._report = state, report
        train, held_back = split_documents(len(data), settings.validation_share, settings.seed)
        self._num_train = len(train)
        per_process = max(1, settings.batch // processes.world_size)
        self.model = NeuralIndexer(make_spec(data, settings))
        sampling = Sampling(
            documents=per_process,
            tokens=settings.tokens,
            query_window=settings.query_window,
            reach=self.model.spec.reach,
            schedule=settings.schedule,
            decays=settings.decays,
            seed=settings.seed,
            rank=processes.rank,
            world_size=processes.world_size,
        )
        self.steps = TrainingSteps(data, train, sampling)
        self.num_steps = settings.epochs * self.steps.steps_per_epoch
        self.validation = Validation(data, held_back, settings.schedule, settings.questions)
        self.model.init_weights(torch.Generator().manual_seed(settings.seed))
        start_from_data(self.model, data, train)
        calibrate_layers(self.model, [self.steps[step] for step in range(min(_FIRST_BATCHES, self.num_steps))])
        self.model.to(device)
        self._optimizer = self._make_optimizer()
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._best: dict[str, torch.Tensor] = {}
        self._losses: list[torch.Tensor] = []
        self._seconds_before, self._started = 0.0, time.monotonic()

    def run(self) -> TrainResult:
        """Train until all steps are done or recall no longer rises."""
        forward = self.processes.wrap(Selections(self.model))
        every = self.settings.validate_every or max(1, self.steps.steps_per_epoch // 2)
        self._started = time.monotonic()
        if not self.history:
            self._validate()
        with tqdm(total=self.num_steps, initial=self.step, unit="step", disable=not self.processes.is_first) as bar:
            for batch in self._batches():
                if self._has_stalled():
                    break
                self._train(batch, forward)
                bar.update()
                if self.step % every == 0 or self.step == self.num_steps:
                    self._validate()
                    bar.set_postfix(loss=f"{self.history[-1]['loss']:.4f}", recall=f"{self._recalls()[-1]:.3f}")
                if self.step % self.settings.save_every == 0:
                    self._save()
        self._save()
        self.model.load_state_dict(self._best)
        return TrainResult(self.model, self.history, self.step, self.seconds / 60, self._num_train)

    @property
    def seconds(self) -> float:
        """Training time so far, that before a resume included."""
        return self._seconds_before + time.monotonic() - self._started

    def resume(self) -> None:
        """Go on from the saved state.

        Raises:
            ConfigError: it was made with other settings or other data.
        """
        saved: dict[str, Any] = torch.load(self._state, map_location="cpu", weights_only=True)
        for name, mine in self._identity().items():
            theirs = saved["identity"].get(name)
            if theirs != mine:
                raise ConfigError(
                    f"--resume: {self._state} was made with {name} {theirs!r}, {mine!r} is given; allowed is the same"
                )
        self.model.load_state_dict(saved["model"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self.step, self.history, self._best = saved["step"], saved["history"], saved["best"]
        self._losses = [loss.to(self.device) for loss in saved["losses"]]
        self._seconds_before, self._started = saved["seconds"], time.monotonic()

    def _identity(self) -> dict[str, object]:
        return asdict(self.settings) | {"data": self.model.spec.data, "processes": self.processes.world_size}

    def _make_optimizer(self) -> torch.optim.Optimizer:
        named = dict(self.model.named_parameters())
        offsets = [named.pop(name) for name in _OFFSETS]
        head = [named.pop(name) for name in list(named) if name.startswith("head.")]
        groups = (list(named.values()), 1), (offsets, OFFSET_SPEED), (head, HEAD_SPEED)
        return torch.optim.AdamW(
            [{"params": params, "speed": speed} for params, speed in groups],
            lr=self.settings.lr,
            weight_decay=WEIGHT_DECAY,
            fused=self.device.type == "cuda",
        )

    def _batches(self) -> DataLoader[Batch]:
        on_gpu = self.device.type == "cuda"
        return DataLoader(
            self.steps,
            batch_size=None,
            sampler=range(self.step, self.num_steps),
            num_workers=2 if on_gpu else 0,
            pin_memory=on_gpu,
        )

    def _train(self, batch: Batch, forward: nn.Module) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = group["speed"] * self.settings.lr * learning_rate_share(self.step, self.num_steps)
        batch = Batch(*(tensor.to(self.device, non_blocking=True) for tensor in batch))
        half = torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()
        with half:
            logits: Logits = forward(batch)
        loss = self._loss(logits.content, batch)
        if logits.forecast is not None:
            loss = loss + self._loss(logits.forecast, batch)
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self._optimizer.step()
        self.step += 1
        self._losses.append(loss.detach())

    def _loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Loss of logits [N, S, M]: first selections, their opening, and later ones."""
        later = 1 + self.settings.opening_steps
        spans = (slice(0, 1), 1.0), (slice(1, later), 1.0), (slice(later, None), LATER_SHARE)
        losses = [
            share * attention_loss(logits[:, span], batch.labels[:, span], batch.weights[:, span], self.settings.power)
            for span, share in spans
        ]
        return torch.stack(losses).sum()

    def _validate(self) -> None:
        self.model.eval()
        row = self.processes.mean(self.validation.run(self.model, self.processes.rank, self.processes.world_size))
        self.model.train()
        loss = torch.stack(self._losses).mean().item() if self._losses else math.nan
        self._losses.clear()
        self.history.append({"step": self.step, "loss": loss, **row})
        recalls = self._recalls()
        if not self._best or recalls[-1] > max(recalls[:-1]):
            self._best = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        if self.processes.is_first:
            told = f"loss {loss:.4f}" if self.step else "before training"
            self._report(f"step {self.step}: {told}, recall {recalls[-1]:.3f} at {MAIN_RATIO:.1%}")

    def _recalls(self) -> list[float]:
        return [row[f"recall@{MAIN_RATIO}"] for row in self.history]

    def _has_stalled(self) -> bool:
        recalls = self._recalls()
        return len(recalls) - 1 - recalls.index(max(recalls)) >= self.settings.patience

    def _save(self) -> None:
        """Write the state, whole or not at all."""
        if not self.processes.is_first:
            return
        saved = {
            "identity": self._identity(),
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "best": self._best,
            "step": self.step,
            "history": self.history,
            "losses": self._losses,
            "seconds": self.seconds,
        }
        state = io.BytesIO()
        torch.save(saved, state)
        with whole_file(self._state) as partial:
            partial.write_bytes(state.getbuffer())
