"""The one table of every metric: code, scrape text, HTTP route and `docs/metrics.md` follow from it."""

from dataclasses import dataclass
from typing import Literal

PREFIX = "flashmemory:"
LABELS = ("model_name", "engine")

Kind = Literal["counter", "gauge"]
Source = Literal["worker", "scheduler", "derived"]


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric of one engine.

    Attributes:
        name: name without the prefix; counters end in `_total`.
        kind: a counter only grows, a gauge is the value now.
        unit: what one unit of the value is.
        question: the question the metric answers.
        source: the process that counts it. A derived one is computed from others when they are read.
        labels: Prometheus labels, the same as those of vLLM's own metrics.
    """

    name: str
    kind: Kind
    unit: str
    question: str
    source: Source = "worker"
    labels: tuple[str, ...] = LABELS

    @property
    def full_name(self) -> str:
        """Name on `/metrics`."""
        return PREFIX + self.name


METRICS = (
    MetricSpec("resident_blocks", "gauge", "blocks", "How many blocks of the running requests are on the device?"),
    MetricSpec("total_blocks", "gauge", "blocks", "How many blocks do the running requests have in all?"),
    MetricSpec(
        "resident_ratio",
        "gauge",
        "ratio",
        "What share of the running requests' blocks is on the device?",
        "derived",
    ),
    MetricSpec("slots_used", "gauge", "slots", "How many device slots hold a block?"),
    MetricSpec("slots_total", "gauge", "slots", "How many device slots are there?"),
    MetricSpec("host_blocks_used", "gauge", "blocks", "How many blocks have a valid copy in host memory?"),
    MetricSpec("host_blocks_total", "gauge", "blocks", "How many blocks can host memory hold?"),
    MetricSpec("recalled_blocks_total", "counter", "blocks", "How many blocks came back from host to device?"),
    MetricSpec("recalled_bytes_total", "counter", "bytes", "How much did recalls load the host link?"),
    MetricSpec("written_back_blocks_total", "counter", "blocks", "How many blocks were copied from device to host?"),
    MetricSpec("written_back_bytes_total", "counter", "bytes", "How much did write-backs load the host link?"),
    MetricSpec("evictions_total", "counter", "blocks", "How many blocks gave up their slot?"),
    MetricSpec(
        "prefetched_blocks_total",
        "counter",
        "blocks",
        "How many of the recalled blocks came in while decode went on?",
    ),
    MetricSpec(
        "streamed_blocks_total",
        "counter",
        "blocks",
        "How many host blocks did prefill read through its buffers?",
    ),
    MetricSpec("streamed_bytes_total", "counter", "bytes", "How much did streaming load the host link?"),
    MetricSpec("selections_total", "counter", "selections", "How often was a resident set chosen anew?"),
    MetricSpec(
        "missing_selections_total",
        "counter",
        "selections",
        "How often was a selection not ready when its cycle began?",
    ),
    MetricSpec("late_recalls_total", "counter", "steps", "How many steps waited for a recall?"),
    MetricSpec("stall_seconds_total", "counter", "seconds", "How long did steps wait for copies in all?"),
    MetricSpec(
        "refused_admissions_total",
        "counter",
        "requests",
        "How often had a request to wait for slots?",
        "scheduler",
    ),
    MetricSpec(
        "decode_resident_blocks_total",
        "counter",
        "blocks",
        "How many blocks did decode steps attend to? Over the next one: the mean resident share.",
    ),
    MetricSpec(
        "decode_context_blocks_total",
        "counter",
        "blocks",
        "How many blocks did the requests of those steps have?",
    ),
)
BY_NAME = {spec.name: spec for spec in METRICS}

# Derived gauge: numerator and denominator
RATIOS = {"resident_ratio": ("resident_blocks", "total_blocks")}
