"""Publishes what the worker counted into its shared counters file."""

from flashmemory_vllm.observability.counters import CounterWriter
from flashmemory_vllm.observability.metrics import series
from flashmemory_vllm.residency.counters import Histogram
from flashmemory_vllm.residency.planner import StepPlanner
from flashmemory_vllm.runtime.choices import ChoiceQueue
from flashmemory_vllm.transfer.engine import TransferEngine

# With so many requests counters are written every so many steps: nobody reads them more often, and it takes the host as
# long as a dozen rows. When the last request goes they are written in any case.
MANY_REQUESTS, MANY_STEPS = 16, 8
# Steps between two writes of the histograms: sorting values into buckets costs more than all other counting
HISTOGRAM_STEPS = 64


class Reporter:
    """Copies the planner's and the engine's totals to the shared counters: with few requests once a step.

    Totals are published as what came on top since the last call, so that a reset of residency (sleep, warm-up)
    never makes a counter go back.

    Args:
        counters: this worker's file.
        planner: counts blocks.
        engine: counts bytes and the waits for them.
        choices: counts the waits for lists.
    """

    def __init__(
        self, counters: CounterWriter, planner: StepPlanner, engine: TransferEngine, choices: ChoiceQueue
    ) -> None:
        self._counters = counters
        self._planner = planner
        self._engine = engine
        self._choices = choices
        self._published: dict[str, float] = {}
        self._failed = {reason: series("failed_selections_total", reason) for reason in choices.failures}
        self._fallbacks = series("dense_fallbacks_total", "score_share")
        self._num_calls = 0
        counters.set("workers", 1)
        planned = planner.counters
        self._histograms = (
            _Growth("selection_latency_seconds", planned.selection_latency_seconds),
            _Growth("block_lifetime_steps", planned.block_lifetime_steps),
            _Growth("block_idle_steps", planned.block_idle_steps),
        )

    def publish(self) -> None:
        """Write every counter and gauge, if it is time."""
        self._num_calls += 1
        if len(self._planner.requests) >= MANY_REQUESTS and self._num_calls % MANY_STEPS:
            return
        usage, planned, moved = self._planner.usage(), self._planner.counters, self._engine.counters
        totals = {
            "recalled_blocks_total": planned.recalled_blocks + planned.prefetched_blocks,
            "prefetched_blocks_total": planned.prefetched_blocks,
            "written_back_blocks_total": planned.written_back_blocks,
            "evictions_total": planned.evictions,
            "selections_total": planned.selections,
            self._fallbacks: planned.fallbacks,
            "refused_dense_fallbacks_total": planned.refused_fallbacks,
            "revoked_dense_fallbacks_total": planned.revoked_fallbacks,
            "missing_selections_total": planned.missing_selections,
            "selection_candidates_total": planned.selection_candidates,
            "selected_blocks_total": planned.selected_blocks,
            "reselected_blocks_total": planned.reselected_blocks,
            "reselected_resident_blocks_total": planned.reselected_resident_blocks,
            "judged_prefetches_total": planned.judged_prefetches,
            "useful_prefetches_total": planned.useful_prefetches,
            "decode_resident_blocks_total": planned.decode_resident_blocks,
            "decode_context_blocks_total": planned.decode_context_blocks,
            "streamed_blocks_total": planned.streamed_blocks,
            "recalled_bytes_total": moved.bytes_h2d,
            "streamed_bytes_total": moved.bytes_streamed,
            "written_back_bytes_total": moved.bytes_d2h,
            "compared_pages_total": moved.compared_pages,
            "page_checksum_failures_total": moved.wrong_pages,
            "late_recalls_total": moved.late_fences,
            "stall_seconds_total": moved.stall_seconds + self._choices.stall_seconds,
        }
        for reason, count in self._choices.failures.items():
            totals[self._failed[reason]] = count
        for name, total in totals.items():
            if growth := total - self._published.get(name, 0):
                self._counters.add(name, growth)
        self._published = totals
        # An idle server has published all
        if self._num_calls % HISTOGRAM_STEPS == 0 or not usage.num_requests:
            for histogram in self._histograms:
                histogram.publish(self._counters)
        self._counters.set("resident_blocks", usage.resident_blocks)
        self._counters.set("total_blocks", usage.total_blocks)
        self._counters.set("slots_used", usage.slots_used)
        self._counters.set("slots_total", usage.num_slots)
        self._counters.set("host_blocks_used", usage.host_blocks)
        self._counters.set("host_blocks_total", self._planner.geometry.num_logical_blocks - 1)


class _Growth:
    """What a histogram has counted since it was last published."""

    def __init__(self, name: str, histogram: Histogram) -> None:
        self._name = name
        self._histogram = histogram
        self._published = histogram.read()

    def publish(self, counters: CounterWriter) -> None:
        """Write what came on top, if anything."""
        totals, last = self._histogram.read(), self._published
        if totals.counts != last.counts:
            growth = [count - before for count, before in zip(totals.counts, last.counts, strict=True)]
            counters.observe(self._name, growth, totals.total - last.total)
            self._published = totals
