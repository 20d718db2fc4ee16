"""When to go on to longer contexts, and which lengths and tasks the next batch should train."""

from dataclasses import dataclass, field

import numpy as np

from flashmemory_vllm.evaluation.tasks import TASK_NAMES, TaskName
from flashmemory_vllm.reference.data import MIN_TASK_LEN, BatchPlan

_FIRST_LEN = 128
# Mixed in from the start: with half as many needles the first retrieval is learned sooner.
_SHORTEST_LEN = 64
_PASS_ACCURACY = 0.9
_MIN_STEPS_A_LENGTH = 30
_MIN_STEPS_BEFORE_FORCED = 150
_DECAY = 0.9
_CURRENT_LENGTH_CHANCE = 0.5
_LAG_WEIGHT = 3.0
_BASE_WEIGHTS: dict[TaskName, float] = {
    "multikey": 2.0,
    "multivalue": 1.0,
    "multiquery": 1.0,
    "tracking": 1.0,
    "late": 0.4,
}


@dataclass(slots=True)
class Curriculum:
    """Doubles the length when accuracy passes 0.9, or when the clock says that time for longer ones runs out.

    The clock never ends the first length: below the retrieval plateau, longer contexts only bury the signal.

    Attributes:
        max_tokens: the last length.
        tokens_per_step: tokens of each batch.
        seed: seed of the mixture of lengths.
        forced_share: share of the wall-clock after which the last length is entered in any case. Default: 0.5
        num_tokens: the length that is being learned.
        steps: steps taken at this length.
        accuracy: running exact match of each task, over all lengths.
        accuracy_here: running exact match of each task at this length.
    """

    max_tokens: int
    tokens_per_step: int
    seed: int
    forced_share: float = 0.5
    num_tokens: int = _FIRST_LEN
    steps: int = 0
    accuracy: dict[TaskName, float] = field(default_factory=dict)
    accuracy_here: dict[TaskName, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.num_tokens = min(self.num_tokens, self.max_tokens)

    def plan(self, step: int) -> BatchPlan:
        """The batch of a step: half the time the current length, otherwise any shorter one."""
        rng = np.random.default_rng([self.seed, step, 1])
        shorter = [_SHORTEST_LEN << power for power in range((self.num_tokens // _SHORTEST_LEN).bit_length() - 1)]
        num_tokens = self.num_tokens
        if shorter and rng.random() >= _CURRENT_LENGTH_CHANCE:
            num_tokens = int(rng.choice(shorter))
        weights = tuple(
            (task, _BASE_WEIGHTS[task] * (1 + _LAG_WEIGHT * (1 - self.accuracy.get(task, 0.0)))) for task in TASK_NAMES
        )
        return BatchPlan(max(1, self.tokens_per_step // num_tokens), num_tokens, weights)

    def observe(self, num_tokens: int, exact_match: dict[TaskName, float], clock_share: float) -> bool:
        """Take in the accuracy of one batch.

        Args:
            num_tokens: the length of the batch.
            exact_match: share of right answers of each task that came up.
            clock_share: share of the wall-clock that is used up.

        Returns:
            Whether the length was doubled.
        """
        _average(self.accuracy, exact_match)
        if num_tokens != self.num_tokens:
            return False
        _average(self.accuracy_here, exact_match)
        self.steps += 1
        if self.num_tokens >= self.max_tokens or not (self._passed() or self._is_late(clock_share)):
            return False
        self.num_tokens *= 2
        self.steps = 0
        self.accuracy_here = {}
        return True

    def _passed(self) -> bool:
        tasks = [task for task in TASK_NAMES if self.num_tokens >= MIN_TASK_LEN[task]]
        mean = sum(self.accuracy_here.get(task, 0.0) for task in tasks) / len(tasks)
        return self.steps >= _MIN_STEPS_A_LENGTH and mean >= _PASS_ACCURACY

    def _is_late(self, clock_share: float) -> bool:
        num_doublings = (self.max_tokens // _FIRST_LEN).bit_length() - 1
        num_done = (self.num_tokens // _FIRST_LEN).bit_length() - 1
        if num_done == 0 or self.steps < _MIN_STEPS_BEFORE_FORCED:
            return False
        return clock_share > self.forced_share * (num_done + 1) / max(1, num_doublings)


def _average(running: dict[TaskName, float], new: dict[TaskName, float]) -> None:
    for task, value in new.items():
        running[task] = _DECAY * running.get(task, value) + (1 - _DECAY) * value
