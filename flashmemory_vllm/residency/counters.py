"""What the pager counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

STEP_BOUNDS: tuple[float, ...] = (1, 4, 16, 64, 256, 1024, 4096, 16384)
SECOND_BOUNDS: tuple[float, ...] = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


# Arrays that wait to be sorted into ranges, many at once: that takes about as long as one
MAX_WAITING = 64


class Totals(NamedTuple):
    """What a histogram has counted.

    Attributes:
        counts: values in each range; the last range is above all bounds.
        total: sum of all values.
    """

    counts: tuple[int, ...]
    total: float


class Histogram:
    """How many values fell into each range, and their sum.

    Args:
        bounds: upper ends of the ranges, inclusive and ascending.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self._edges = np.array(bounds, np.float64)
        self._counts = np.zeros(len(bounds) + 1, np.int64)
        self._total = 0.0
        self._waiting: list[npt.NDArray[np.float64]] = []

    def observe(self, values: npt.NDArray[np.float64]) -> None:
        """Count each of the values `[n]`, which must not change afterwards."""
        self._waiting.append(values)
        if len(self._waiting) == MAX_WAITING:
            self._sort_in()

    def read(self) -> Totals:
        """What was counted so far."""
        if self._waiting:
            self._sort_in()
        return Totals(tuple(self._counts.tolist()), self._total)

    def _sort_in(self) -> None:
        values = np.concatenate(self._waiting)
        self._counts += np.bincount(self._edges.searchsorted(values), minlength=self._counts.size)
        self._total += float(values.sum())
        self._waiting = []


@dataclass(slots=True)
class Counters:
    """Running totals since the planner was made; a block counts once in each layer group it is moved or chosen in.

    Whether a prefetched block was worth it is an estimate: no kernel tells how much weight it gave to a block, but the
    request's next selection scores it again.

    Attributes:
        block_lifetime_steps: of evicted blocks, steps from getting the slot to losing it.
        block_idle_steps: of evicted blocks, steps since a request last held them.
        plans: steps planned.
        evictions: slots taken from a block with a valid host copy.
        recalled_blocks: blocks copied to a slot before a step's attention.
        prefetched_blocks: blocks copied to a slot during a step.
        written_back_blocks: blocks copied to the host.
        streamed_blocks: blocks read from the host by prefill rows.
        selections: selections that changed a resident set or confirmed it.
        missing_selections: first decode steps of a sparse request without a selection.
        selection_candidates: blocks that selections could choose or leave.
        selected_blocks: those of them that were chosen.
        reselected_blocks: blocks chosen by selections after a request's first.
        reselected_resident_blocks: those of them that the request held already.
        judged_prefetches: blocks that came into a set during decode and were scored again by the next selection.
        useful_prefetches: those of them that it chose again.
        fallbacks: requests that fell back to all their blocks, again each time that they come back.
        refused_fallbacks: selections after which a request would have fallen back, had there been slots.
        revoked_fallbacks: fallbacks ended because budgets needed the slots.
        decode_rows: decode rows planned.
        decode_resident_blocks: blocks in the tables of decode rows.
        decode_context_blocks: blocks that hold tokens of decode rows, once per group.
        selection_latency_seconds: from asking for scores to having them.
    """

    block_lifetime_steps: Histogram
    block_idle_steps: Histogram
    plans: int = 0
    evictions: int = 0
    recalled_blocks: int = 0
    prefetched_blocks: int = 0
    written_back_blocks: int = 0
    streamed_blocks: int = 0
    selections: int = 0
    missing_selections: int = 0
    selection_candidates: int = 0
    selected_blocks: int = 0
    reselected_blocks: int = 0
    reselected_resident_blocks: int = 0
    judged_prefetches: int = 0
    useful_prefetches: int = 0
    fallbacks: int = 0
    refused_fallbacks: int = 0
    revoked_fallbacks: int = 0
    decode_rows: int = 0
    decode_resident_blocks: int = 0
    decode_context_blocks: int = 0
    selection_latency_seconds: Histogram = field(default_factory=lambda: Histogram(SECOND_BOUNDS))
