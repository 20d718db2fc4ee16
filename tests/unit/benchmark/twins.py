"""Stand-ins for what the benchmark drives: an engine with a schedule one can predict, and rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from flashmemory_vllm.benchmark.measure import Work
from flashmemory_vllm.benchmark.rows import BenchRow

PREFILL_SECONDS = 1.0
DECODE_SECONDS = 0.01


def make_work(**changes: Any) -> Work:
    fields: dict[str, Any] = {
        "prompt_lens": (100, 100),
        "output_tokens": 20,
        "slack_tokens": 4,
        "streams": 1,
    }
    return Work(**fields | changes)


def make_row(**changes: Any) -> BenchRow:
    fields: dict[str, Any] = {
        "scenario": "s",
        "measurement": "m",
        "engine": "flashmemory",
        "model": "tiny",
        "metric": "step_ms",
        "prompt_tokens": 2000,
        "batch": 2,
        "output_tokens": 20,
        "decoding": 2,
        "command": "flashmemory bench",
        "commit": "abc",
        "gpu": "GPU",
        "versions": {},
    }
    return BenchRow(**fields | changes)


class EngineTwin:
    """Prefills one prompt a second, in order, and then gives every running request a token each 10 ms.

    Args:
        room: requests that run at once.
        selecting: decode steps, counted from 1, at which the engine selects.
        counts: whether it has counters, as our backend does.
    """

    vocabulary = 1000

    def __init__(self, room: int = 99, selecting: Sequence[int] = (), counts: bool = False) -> None:
        self.now = 0.0
        self.seen: list[list[list[int]]] = []
        self.forgotten = 0
        self.aborted = 0
        self._room = room
        self._selecting = selecting
        self._counts = counts
        self._decode_steps = 0
        self._selections = 0
        self._waiting: list[int] = []
        self._left: dict[int, int] = {}
        self._max_tokens = 0

    def clock(self) -> float:
        return self.now

    def submit(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        self.seen.append([list(prompt) for prompt in prompts])
        self._waiting = list(range(len(prompts)))
        self._max_tokens = max_tokens

    def step(self) -> tuple[float, Mapping[int, Sequence[int]]]:
        outputs = {request: [self._left[request]] for request in self._left}
        if self._waiting and len(self._left) < self._room:
            self.now += PREFILL_SECONDS
            first = self._waiting.pop(0)
            self._left[first] = self._max_tokens
            outputs[first] = [7]
        else:
            self._decode_steps += 1
            self._selections += self._decode_steps in self._selecting
            self.now += DECODE_SECONDS * (3 if self._decode_steps in self._selecting else 1)
        self._left = {request: self._left[request] - 1 for request in outputs if self._left[request] > 1}
        return self.now, outputs

    def is_busy(self) -> bool:
        return bool(self._waiting or self._left)

    def abort(self) -> None:
        self.aborted += 1
        self._waiting, self._left = [], {}

    def forget_prefixes(self) -> None:
        self.forgotten += 1

    def counters(self) -> dict[str, float]:
        if not self._counts:
            return {}
        return {"selections_total": float(self._selections), "stall_seconds_total": self._selections * 0.002}

    def preemptions(self) -> int:
        return 0
