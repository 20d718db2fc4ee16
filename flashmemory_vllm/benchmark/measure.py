"""Runs one load on an engine, step by step, and reads figures off the steps."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from flashmemory_vllm.benchmark.prompts import SHARED_SHARE, make_prompts, make_sharing_prompts

# The first steps of a steady batch: graphs are replayed for the first time, recalls of the first selection land
DROPPED_STEPS = 8
# A selection is scored some steps before it is counted and prefetched some steps after: all of these may pay for it
STEPS_AROUND_SELECTION = 2
# Apart from the families of all measurements
WARM_UP_STREAMS = 1 << 20


class StepEngine(Protocol):
    """An engine that is driven step by step."""

    vocabulary: int

    def submit(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        """Start a request for each prompt; they are numbered from 0 in this order."""

    def step(self) -> tuple[float, Mapping[int, Sequence[int]]] | None:
        """Wait for the next step's tokens.

        Returns:
            When the engine's scheduler had them, by the clock that `measure` reads, and new token ids by request,
            without requests that got none. None if there are no tokens at all.
        """

    def is_busy(self) -> bool:
        """Whether a request is unfinished."""

    def abort(self) -> None:
        """End every request."""

    def forget_prefixes(self) -> None:
        """Empty the prefix cache."""

    def counters(self) -> dict[str, float]:
        """Our metrics since the start, by name without prefix; empty if the backend is not ours. Quick."""

    def preemptions(self) -> int:
        """Requests that were preempted since the start."""


@dataclass(frozen=True, slots=True)
class Work:
    """One load, as an engine's process gets it.

    Attributes:
        prompt_lens: tokens of each prompt.
        output_tokens: see `scenario.Load`, as are the flags.
        slack_tokens: tokens that a request may generate while others are still in prefill, above that.
        streams: family of the prompts.
        shared_prefix: prompts have a beginning in common, computed before the clock starts.
        keep_prefixes: blocks of earlier loads may be found in the prefix cache.
        compare_outputs: whether digests are kept.
        keep_steps: whether the time of every step is kept.
        warm_ups: runs before the one that counts.
        must_fit: whether to skip what the KV blocks cannot hold.
    """

    prompt_lens: tuple[int, ...]
    output_tokens: int
    slack_tokens: int
    streams: int
    shared_prefix: bool = False
    keep_prefixes: bool = False
    compare_outputs: bool = False
    keep_steps: bool = False
    warm_ups: int = 0
    must_fit: bool = False

    def num_blocks(self, block_size: int) -> int:
        """KV blocks that all requests fill to their end, those of a shared beginning counted once."""
        room = self.output_tokens + self.slack_tokens
        total = sum(-(-(length + room) // block_size) for length in self.prompt_lens)
        shared = int(SHARED_SHARE * min(self.prompt_lens)) // block_size if self.shared_prefix else 0
        return total - shared * (len(self.prompt_lens) - 1)


@dataclass(slots=True)
class StepLog:
    """What came out of every step that had an output.

    Attributes:
        started: when the first request was submitted, in seconds.
        times: when each step's tokens were there.
        active: requests that got tokens in it.
        tokens: generated ids by request.
        first_tokens: when each request got its first token.
        counters: counters after each step, if they were asked for.
    """

    started: float
    times: list[float] = field(default_factory=list)
    active: list[frozenset[int]] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    first_tokens: dict[int, float] = field(default_factory=dict)
    counters: list[dict[str, float]] = field(default_factory=list)

    def add(self, now: float, tokens: Mapping[int, Sequence[int]]) -> None:
        """Record one step."""
        self.times.append(now)
        self.active.append(frozenset(tokens))
        for request, ids in tokens.items():
            self.first_tokens.setdefault(request, now)
            self.tokens.setdefault(request, []).extend(ids)

    def steady_steps(self) -> list[int]:
        """Steps in which as many requests as ever ran together got a token, the same as in the step before.

        Their times are pure decode where that is the whole batch: nobody is left to prefill. The first few are
        left out.
        """
        most = max(map(len, self.active), default=0)
        steps = [
            step
            for step in range(1, len(self.times))
            if len(self.active[step]) == most and self.active[step] == self.active[step - 1]
        ]
        return steps[DROPPED_STEPS:]


def measure(engine: StepEngine, work: Work, clock: Callable[[], float] = time.monotonic) -> dict[str, object]:
    """Run a load and summarise it.

    Args:
        engine: idle.
        work: the load.
        clock: seconds. The default is one clock for all processes of a Linux machine.

    Returns:
        Fields of a `BenchRow`.
    """
    for repeat in range(work.warm_ups):
        _run(engine, work, work.streams + (repeat + 1) * WARM_UP_STREAMS, clock)
    before, preempted = engine.counters(), engine.preemptions()
    log = _run(engine, work, work.streams, clock)
    after = engine.counters()
    counted = {name: after[name] - before.get(name, 0.0) for name in after}
    return summarise(log, work, counted) | {"preemptions": engine.preemptions() - preempted}


def _run(engine: StepEngine, work: Work, streams: int, clock: Callable[[], float]) -> StepLog:
    if not work.keep_prefixes:
        engine.forget_prefixes()
    if work.shared_prefix:
        shared, prompts = make_sharing_prompts(work.prompt_lens, engine.vocabulary, streams)
        engine.submit([shared], 1)
        _drain(engine)
    else:
        prompts = make_prompts(work.prompt_lens, engine.vocabulary, streams)
    log = StepLog(clock())
    engine.submit(prompts, work.output_tokens + work.slack_tokens)
    left = dict.fromkeys(range(len(prompts)), work.output_tokens)
    while engine.is_busy():
        outputs = engine.step()
        if outputs is None:
            continue
        now, tokens = outputs
        log.add(now, tokens)
        log.counters.append(engine.counters() if work.keep_steps else {})
        if len(log.first_tokens) == len(prompts):
            for request, ids in tokens.items():
                left[request] -= len(ids)
            if all(number <= 0 for number in left.values()):
                engine.abort()
                _drain(engine)
    return log


def _drain(engine: StepEngine) -> None:
    while engine.is_busy():
        engine.step()


def summarise(log: StepLog, work: Work, counted: Mapping[str, float]) -> dict[str, object]:
    """Figures of one run.

    Args:
        log: its steps.
        work: its load.
        counted: what our counters rose by; empty if the backend is not ours.

    Returns:
        Fields of a `BenchRow`; what the run cannot tell is None.
    """
    steady = log.steady_steps()
    spans = np.array([log.times[step] - log.times[step - 1] for step in steady]) * 1e3
    decoding = max(map(len, log.active), default=0)
    last_first = max(log.first_tokens.values(), default=log.started)
    comparable_prefill = len(log.first_tokens) == len(work.prompt_lens) and not (
        work.shared_prefix or work.keep_prefixes
    )
    generated = sum(map(len, log.tokens.values()))
    figures: dict[str, object] = {
        "decoding": decoding,
        "requests": decoding,
        "steps": len(spans),
        **(times := _percentiles(spans, "")),
        "step_ms": times["p50_ms"],
        "mean_ms": float(spans.mean()) if len(spans) else None,
        "decode_tokens_per_s": decoding / float(spans.mean()) * 1e3 if len(spans) else None,
        "prefill_tokens_per_s": sum(work.prompt_lens) / (last_first - log.started) if comparable_prefill else None,
        "output_tokens_per_s": generated / (log.times[-1] - log.started) if log.times else None,
        "seconds": log.times[-1] - log.started if log.times else None,
        "stall_seconds": counted.get("stall_seconds_total"),
        "bytes_h2d": _whole(counted.get("recalled_bytes_total")),
        "bytes_streamed": _whole(counted.get("streamed_bytes_total")),
        "bytes_d2h": _whole(counted.get("written_back_bytes_total")),
        "selections": _whole(counted.get("selections_total")),
        "late_recalls": _whole(counted.get("late_recalls_total")),
    }
    if work.keep_steps:
        figures |= _step_figures(log, steady, spans)
    if work.compare_outputs:
        # Requests may run on while the slowest finishes: what all of them have is compared
        figures["texts"] = [_digest(ids[: work.output_tokens]) for _, ids in sorted(log.tokens.items())]
    return figures


def _step_figures(log: StepLog, steady: Sequence[int], spans: np.ndarray) -> dict[str, object]:
    """Times of single steps, those near a selection apart, and the share of them that was spent waiting."""
    figures: dict[str, object] = {"steps_ms": [round(float(span), 3) for span in spans]}
    if not steady or "selections_total" not in log.counters[steady[0]]:
        return figures
    chosen = [step for step in steady if _rise(log, step, "selections_total") > 0]
    near = np.array([min((abs(step - one) for one in chosen), default=len(log.times)) for step in steady])
    is_near = near <= STEPS_AROUND_SELECTION
    stalled = sum(_rise(log, step, "stall_seconds_total") for step in steady)
    return figures | {
        "stall_share": stalled / (float(spans.sum()) / 1e3),
        "selecting_steps": [index for index, is_one in enumerate(is_near) if is_one],
        **_percentiles(spans[is_near], "selecting_"),
        **_percentiles(spans[~is_near], "other_"),
    }


def _rise(log: StepLog, step: int, name: str) -> float:
    return log.counters[step][name] - log.counters[step - 1][name]


def _percentiles(spans: np.ndarray, prefix: str) -> dict[str, object]:
    if not len(spans):
        return {f"{prefix}p50_ms": None, f"{prefix}p95_ms": None}
    p50, p95 = np.percentile(spans, (50, 95))
    return {f"{prefix}p50_ms": float(p50), f"{prefix}p95_ms": float(p95)}


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _digest(ids: Sequence[int]) -> str:
    return hashlib.sha256(np.array(ids, dtype=np.int64).tobytes()).hexdigest()[:16]
