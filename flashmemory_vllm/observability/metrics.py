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
        reasons: values of the label `reason`; each has a value of its own. Default: the metric has no such label.
    """

    name: str
    kind: Kind
    unit: str
    question: str
    source: Source = "worker"
    reasons: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Prometheus labels: those of vLLM's own metrics, and ours."""
        return (*LABELS, "reason") if self.reasons else LABELS

    @property
    def series(self) -> dict[str, tuple[str, ...]]:
        """Names of its values, without the prefix, and what each has for labels beside the common ones."""
        return {series(self.name, reason): (reason,) for reason in self.reasons} or {self.name: ()}

    @property
    def full_name(self) -> str:
        """Name on `/metrics`."""
        return PREFIX + self.name


def series(name: str, reason: str) -> str:
    """Name of the value of a metric for one reason, as Prometheus writes it."""
    return f'{name}{{reason="{reason}"}}'


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
        "requests_sparse_total",
        "counter",
        "requests",
        "How many requests started with a resident set smaller than themselves?",
        "scheduler",
    ),
    MetricSpec(
        "requests_dense_total",
        "counter",
        "requests",
        "How many requests started with all their blocks resident, and why: too short, room for all of them in the "
        "mode `pressure`, or a ratio that leaves none out?",
        "scheduler",
        reasons=("below_min_sparse_tokens", "mode_pressure", "ratio_keeps_all"),
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
# The values in the order of the counter files, each with its metric
SERIES = {key: spec for spec in METRICS for key in spec.series}

# Derived gauge: numerator and denominator
RATIOS = {"resident_ratio": ("resident_blocks", "total_blocks")}
