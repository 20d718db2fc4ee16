"""Plays a trace to an engine, step by step, and notices who gets no token."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from flashmemory_vllm.soak.trace import SoakRequest, Trace

# Shares of the requests after which the engine is left to become idle and is measured; before the first, caches fill
MEASUREMENTS = (0.2, 0.4, 0.6, 0.8, 1.0)
LOOK_EVERY_STEPS = 32


@dataclass(frozen=True, slots=True)
class Part:
    """What a step gave one answer of a request.

    Attributes:
        name: of the request.
        place: which of its answers.
        token_ids: new tokens, or with `is_whole` all so far.
        is_whole: see there.
        is_finished: it is complete.
    """

    name: str
    place: int
    token_ids: Sequence[int]
    is_whole: bool
    is_finished: bool


@dataclass(frozen=True, slots=True)
class Text:
    """A finished answer.

    Attributes:
        name: of the request.
        place: which of its answers.
        token_ids: generated ids.
    """

    name: str
    place: int
    token_ids: tuple[int, ...]


class SoakEngine(Protocol):
    """What a trace is played to."""

    def add(self, request: SoakRequest, prompt: Sequence[int]) -> None:
        """Start a request."""

    def abort(self, name: str) -> None:
        """End a request; its parts come no more."""

    def step(self) -> Sequence[Part]:
        """Run one engine step."""

    def has_work(self) -> bool:
        """Whether a step is left to do, if only to tell the worker who has finished."""

    def look(self) -> Mapping[str, float]:
        """Gauges, by name: what is to be recorded at its highest."""

    def measure(self) -> Mapping[str, float]:
        """Memory of the idle engine and its process."""


@dataclass(slots=True)
class Outcome:
    """What happened.

    Attributes:
        added: requests that arrived.
        finished: requests that got all their answers.
        aborted: requests whose client went away.
        hanging: names of requests that got no token for as long as the patience lasted.
        steps: engine steps.
        seconds: how long it took.
        peaks: the highest of each gauge.
        measured: memory of the idle engine, at each of `MEASUREMENTS`.
    """

    added: int = 0
    finished: int = 0
    aborted: int = 0
    hanging: list[str] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    peaks: dict[str, float] = field(default_factory=dict)
    measured: list[Mapping[str, float]] = field(default_factory=list)


@dataclass(slots=True)
class _Open:
    request: SoakRequest
    arrived: int
    progressed: int
    texts: list[list[int]]
    unfinished: set[int]


class Driver:
    """Plays one trace. Arrivals and aborts go by engine steps, so a replay brings them at the same places.

    Args:
        trace: what to play.
        engine: whom to play it to.
        keep: gets each finished text at once.
        seconds: no request arrives later than this, or None.
        clock: seconds of a monotonic clock.
    """

    def __init__(
        self,
        trace: Trace,
        engine: SoakEngine,
        keep: Callable[[Text], None],
        seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trace = trace
        self._settings = trace.settings
        self._engine = engine
        self._keep = keep
        self._seconds = seconds
        self._clock = clock
        self._started = clock()
        self._open: dict[str, _Open] = {}
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Play all of it, or as much as there is time for, and wait until the engine is idle."""
        self._started = self._clock()
        count = len(self._trace.requests)
        ends = [int(count * share) for share in MEASUREMENTS]
        for start, end in pairwise((0, *ends)):
            self._play(self._trace.requests[start:end])
            self._drain()
            self.outcome.measured.append(self._engine.measure())
        self.outcome.seconds = self._clock() - self._started
        return self.outcome

    def _play(self, requests: Sequence[SoakRequest]) -> None:
        outcome = self.outcome
        due = outcome.steps
        for request in requests:
            due += request.gap_steps
            while outcome.steps < due or len(self._open) >= self._settings.max_open:
                self._step()
            if self._is_late():
                return
            # Who had to wait outside does not make the next one come at once
            due = outcome.steps
            self._add(request)

    def _drain(self) -> None:
        while self._open or self._engine.has_work():
            self._step()

    def _add(self, request: SoakRequest) -> None:
        step = self.outcome.steps
        texts: list[list[int]] = [[] for _ in range(request.num_answers)]
        self._open[request.name] = _Open(request, step, step, texts, set(range(request.num_answers)))
        self._engine.add(request, self._trace.prompt(request))
        self.outcome.added += 1

    def _step(self) -> None:
        outcome = self.outcome
        self._abort_due()
        for part in self._engine.step():
            self._take(part)
        outcome.steps += 1
        if outcome.steps % LOOK_EVERY_STEPS == 0:
            for name, value in self._engine.look().items():
                outcome.peaks[name] = max(value, outcome.peaks.get(name, value))
        self._give_up_hanging()

    def _abort_due(self) -> None:
        for one in list(self._open.values()):
            after = one.request.abort_after_steps
            if after is not None and self.outcome.steps >= one.arrived + after:
                self._engine.abort(one.request.name)
                del self._open[one.request.name]
                self.outcome.aborted += 1

    def _take(self, part: Part) -> None:
        one = self._open.get(part.name)
        if one is None or part.place not in one.unfinished:
            return
        text = one.texts[part.place]
        text[0 if part.is_whole else len(text) :] = part.token_ids
        if part.token_ids:
            one.progressed = self.outcome.steps
        if part.is_finished:
            one.unfinished.remove(part.place)
            self._keep(Text(part.name, part.place, tuple(text)))
        if not one.unfinished:
            del self._open[part.name]
            self.outcome.finished += 1

    def _give_up_hanging(self) -> None:
        for one in list(self._open.values()):
            if self.outcome.steps - one.progressed > self._settings.patience_steps:
                self.outcome.hanging.append(one.request.name)
                self._engine.abort(one.request.name)
                del self._open[one.request.name]

    def _is_late(self) -> bool:
        return self._seconds is not None and self._clock() - self._started > self._seconds
