"""Publishes what the worker counted into its shared counters file."""

from flashmemory_vllm.observability.counters import CounterWriter
from flashmemory_vllm.residency.planner import StepPlanner
from flashmemory_vllm.transfer.engine import TransferEngine


class Reporter:
    """Copies the planner's and the engine's totals to the shared counters, once a step.

    Totals are published as what came on top since the last call, so that a reset of residency (sleep, warm-up)
    never makes a counter go back.

    Args:
        counters: this worker's file.
        planner: counts blocks.
        engine: counts bytes.
    """

    def __init__(self, counters: CounterWriter, planner: StepPlanner, engine: TransferEngine) -> None:
        self._counters = counters
        self._planner = planner
        self._engine = engine
        self._published: dict[str, float] = {}
        self._stall_seconds = 0.0

    def stalled(self, seconds: float) -> None:
        """Count host time for which a step waited for scores or copies."""
        self._stall_seconds += seconds

    def publish(self) -> None:
        """Write every counter and gauge."""
        usage, planned, moved = self._planner.usage(), self._planner.counters, self._engine.counters
        totals = {
            "recalled_blocks_total": planned.recalled_blocks + planned.prefetched_blocks,
            "prefetched_blocks_total": planned.prefetched_blocks,
            "written_back_blocks_total": planned.written_back_blocks,
            "evictions_total": planned.evictions,
            "selections_total": planned.selections,
            "missing_selections_total": planned.missing_selections,
            "decode_resident_blocks_total": planned.decode_resident_blocks,
            "decode_context_blocks_total": planned.decode_context_blocks,
            "streamed_blocks_total": planned.streamed_blocks,
            "recalled_bytes_total": moved.bytes_h2d,
            "streamed_bytes_total": moved.bytes_streamed,
            "written_back_bytes_total": moved.bytes_d2h,
            "late_recalls_total": moved.late_fences,
            "stall_seconds_total": self._stall_seconds,
        }
        for name, total in totals.items():
            self._counters.add(name, total - self._published.get(name, 0))
        self._published = dict(totals)
        self._counters.set("resident_blocks", usage.resident_blocks)
        self._counters.set("total_blocks", usage.total_blocks)
        self._counters.set("slots_used", usage.slots_used)
        self._counters.set("slots_total", usage.num_slots)
        self._counters.set("host_blocks_used", usage.host_blocks)
        self._counters.set("host_blocks_total", self._planner.geometry.num_logical_blocks - 1)
