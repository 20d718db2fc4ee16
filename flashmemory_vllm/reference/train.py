"""Trainer of the reference model: one process, one device, a wall-clock budget."""

import io
import json
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from flashmemory_vllm.evaluation.tasks import TASK_NAMES, TaskName
from flashmemory_vllm.files import whole_file
from flashmemory_vllm.reference.curriculum import Curriculum
from flashmemory_vllm.reference.data import BatchPlan, Prefetcher, TrainingBatch
from flashmemory_vllm.reference.model import ReferenceConfig, ReferenceModel

_WARMUP_STEPS = 100
_DECAY_FROM = 0.65
_FINAL_LR_SHARE = 0.02
_MAX_GRAD_NORM = 1.0
_CHECKPOINT_SECONDS = 60.0
_LOG_DECAY = 0.9


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What a training run may choose.

    Attributes:
        seed: seed of weights and data.
        max_minutes: wall-clock budget of training, resumed parts included.
        max_tokens: longest context.
        tokens_per_step: tokens of each batch.
        lr: peak learning rate.
        device: torch device.
        compile: run the decoder layers through `torch.compile`.
        log_every: steps between two log lines.
        max_steps: steps after which training ends in any case; 0 leaves only the clock.
    """

    seed: int = 0
    max_minutes: float = 8.0
    max_tokens: int = 32768
    tokens_per_step: int = 65536
    lr: float = 1e-3
    device: str = "cuda"
    compile: bool = False
    log_every: int = 50
    max_steps: int = 0


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The trained model and what it took."""

    model: ReferenceModel
    num_steps: int
    minutes: float


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What one step left behind, still on the device; reading it a step later keeps the device busy."""

    batch: TrainingBatch
    loss: Tensor
    exact_match: Tensor

    def by_task(self) -> dict[TaskName, float]:
        """Share of wholly right answers of each task in the batch."""
        shares: dict[TaskName, list[float]] = {}
        for span, share in zip(self.batch.spans, self.exact_match.tolist(), strict=True):
            shares.setdefault(span.task, []).append(share)
        return {task: sum(values) / len(values) for task, values in shares.items()}


def _to_device(array: object, device: str) -> Tensor:
    tensor = torch.as_tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else tensor


def exact_match(predicted: Tensor, labels: Tensor, batch: TrainingBatch) -> Tensor:
    """Share of rows `[S]` in which every token of each answer span is right, given `[B, P]` tokens."""
    lengths = torch.tensor([span.stop - span.start for span in batch.spans])
    span_of = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(labels.device, non_blocking=True)
    wrong = torch.zeros(len(labels), len(lengths), device=labels.device)
    wrong.index_add_(1, span_of, (predicted != labels).float())
    return (wrong == 0).float().mean(dim=0)


class Trainer:
    """Model, optimiser, curriculum and clock of one run."""

    def __init__(
        self,
        settings: TrainSettings,
        config: ReferenceConfig,
        checkpoint: Path,
        log: Path,
        report: Callable[[str], None],
    ) -> None:
        self.settings = settings
        self.checkpoint = checkpoint
        self.log = log
        self.report = report
        self.model = ReferenceModel(config)
        self.model.init_weights(torch.Generator().manual_seed(settings.seed))
        self.model.to(settings.device)
        if settings.compile:
            for layer in self.model.model.layers:
                layer.compile(dynamic=True)
        fused = settings.device.startswith("cuda")
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=fused
        )
        self.curriculum = Curriculum(settings.max_tokens, settings.tokens_per_step, settings.seed)
        self.step = 0
        self.loss = float("nan")
        self.accuracy: dict[tuple[TaskName, int], float] = {}
        self._seconds_before = 0.0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Training time so far, that before a resume included."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def clock_share(self) -> float:
        """Share of the budget that is used up."""
        share = self.seconds / (60 * self.settings.max_minutes)
        if self.settings.max_steps:
            share = max(share, self.step / self.settings.max_steps)
        return min(1.0, share)

    def learning_rate(self) -> float:
        """Linear warm-up by steps, then flat, then linear decay by the clock."""
        warm = min(1.0, (self.step + 1) / _WARMUP_STEPS)
        left = min(1.0, (1.0 - self.clock_share) / (1.0 - _DECAY_FROM))
        return self.settings.lr * warm * max(_FINAL_LR_SHARE, left)

    def run(self) -> TrainResult:
        """Train until the clock runs out."""
        self._started = time.monotonic()
        prefetcher = Prefetcher(self.settings.seed, self.step, self._plan)
        pending: deque[_Outcome] = deque()
        saved_at = self.seconds
        for batch in prefetcher:
            pending.append(self._train(batch))
            if len(pending) > 1:
                self._observe(pending.popleft())
            if self.step % self.settings.log_every == 0:
                self._write_log()
            if self.seconds - saved_at > _CHECKPOINT_SECONDS:
                self.save()
                saved_at = self.seconds
            if self.clock_share >= 1.0:
                break
        prefetcher.close()
        while pending:
            self._observe(pending.popleft())
        self._write_log()
        self.save()
        return TrainResult(self.model, self.step, self.seconds / 60)

    def _plan(self, step: int) -> BatchPlan:
        return self.curriculum.plan(step)

    def _train(self, batch: TrainingBatch) -> _Outcome:
        device = self.settings.device
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        labels = _to_device(batch.labels, device)
        weights = _to_device(batch.weights, device).expand(labels.shape)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        logits = self.model(_to_device(batch.tokens, device), _to_device(batch.positions, device), dtype)
        token_loss = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view_as(
            labels
        )
        loss = (token_loss * weights).sum() / weights.sum()
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _MAX_GRAD_NORM)
        self.optimizer.step()
        self.step += 1
        return _Outcome(batch, loss.detach(), exact_match(logits.detach().argmax(-1), labels, batch))

    def _observe(self, outcome: _Outcome) -> None:
        loss, by_task, num_tokens = float(outcome.loss), outcome.by_task(), outcome.batch.plan.num_tokens
        self.loss = loss if math.isnan(self.loss) else _LOG_DECAY * self.loss + (1 - _LOG_DECAY) * loss
        for task, share in by_task.items():
            before = self.accuracy.get((task, num_tokens), share)
            self.accuracy[task, num_tokens] = _LOG_DECAY * before + (1 - _LOG_DECAY) * share
        if self.curriculum.observe(num_tokens, by_task, self.clock_share):
            self.report(f"step {self.step}: on to {self.curriculum.num_tokens} tokens at {self.seconds:.0f} s")

    def _write_log(self) -> None:
        lengths = sorted({num_tokens for _, num_tokens in self.accuracy})
        table = {
            task: {n: round(self.accuracy[task, n], 3) for n in lengths if (task, n) in self.accuracy}
            for task in TASK_NAMES
        }
        row = {
            "step": self.step,
            "seconds": round(self.seconds, 1),
            "num_tokens": self.curriculum.num_tokens,
            "lr": self.learning_rate(),
            "loss": round(self.loss, 4),
            "accuracy": table,
        }
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shares = " | ".join(
            f"{task} " + " ".join(f"{n}:{value:.2f}" for n, value in by_len.items())
            for task, by_len in table.items()
            if by_len
        )
        head = f"step {self.step} {self.seconds:.0f}s len {self.curriculum.num_tokens} loss {self.loss:.4f}"
        self.report(f"{head} lr {self.learning_rate():.1e} | {shares}")

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curriculum": asdict(self.curriculum),
            "accuracy": [(task, num_tokens, share) for (task, num_tokens), share in self.accuracy.items()],
            "step": self.step,
            "seconds": self.seconds,
        }
        saved = io.BytesIO()
        torch.save(state, saved)
        with whole_file(self.checkpoint) as partial:
            partial.write_bytes(saved.getbuffer())

    def resume(self) -> None:
        """Go on from the checkpoint with the settings of this run and the clock of the other."""
        state = torch.load(self.checkpoint, map_location=self.settings.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        learned = state["curriculum"] | {"max_tokens": self.settings.max_tokens}
        self.curriculum = Curriculum(**learned | {"tokens_per_step": self.settings.tokens_per_step})
        self.accuracy = {(task, num_tokens): share for task, num_tokens, share in state["accuracy"]}
        self.step, self._seconds_before = state["step"], state["seconds"]
        self._started = time.monotonic()
