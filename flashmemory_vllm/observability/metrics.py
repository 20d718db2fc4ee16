"""The one table of every metric: code, scrape text, HTTP route and `docs/metrics.md` follow from it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Literal

from prometheus_client.utils import floatToGoString

PREFIX = "flashmemory:"
LABELS = ("model_name", "engine")

Kind = Literal["counter", "gauge", "histogram"]
Source = Literal["worker", "scheduler", "derived"]


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric of one engine.

    Attributes:
        name: name without the prefix; counters end in `_total`.
        kind: a counter only grows, a gauge is the value now, a histogram counts values by their size.
        unit: what one unit of the value is.
        question: the question the metric answers.
        source: the process that counts it. A derived one is computed from others when they are read.
        reasons: values of the label `reason`; each has a value of its own. Default: the metric has no such label.
        bounds: upper ends of a histogram's buckets, ascending; one more bucket has none.
    """

    name: str
    kind: Kind
    unit: str
    question: str
    source: Source = "worker"
    reasons: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Prometheus labels: those of vLLM's own metrics, and ours. A histogram's `le` comes by itself."""
        return (*LABELS, "reason") if self.reasons else LABELS

    @property
    def series(self) -> Mapping[str, Mapping[str, str]]:
        """Names of its values, without the prefix, and the labels of each beside the common ones."""
        if self.kind == "histogram":
            return dict(self._histogram_series())
        return {series(self.name, reason): {"reason": reason} for reason in self.reasons} or {self.name: {}}

    def _histogram_series(self) -> Iterator[tuple[str, Mapping[str, str]]]:
        for bound in (*self.bounds, inf):
            end = floatToGoString(bound)  # type: ignore[no-untyped-call]
            yield f'{self.name}_bucket{{le="{end}"}}', {"le": end}
        yield f"{self.name}_count", {}
        yield f"{self.name}_sum", {}

    @property
    def full_name(self) -> str:
        """Name on `/metrics`."""
        return PREFIX + self.name


def series(name: str, reason: str) -> str:
    """Name of the value of a metric for one reason, as Prometheus writes it."""
    return f'{name}{{reason="{reason}"}}'


STEPS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

METRICS = (
    MetricSpec(
        "workers",
        "gauge",
        "workers",
        "How many workers count? Other values of workers are sums over so many; 0 says that none can be read.",
    ),
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
    MetricSpec(
        "compared_pages_total",
        "counter",
        "pages",
        "How many pages, of one layer each, that came from the host were compared with their checksums?",
    ),
    MetricSpec(
        "page_checksum_failures_total",
        "counter",
        "pages",
        "How many of these were not what had been saved? The requests that needed them have failed.",
    ),
    MetricSpec("selections_total", "counter", "selections", "How often was a resident set chosen anew?"),
    MetricSpec(
        "missing_selections_total",
        "counter",
        "selections",
        "How often was a selection not ready when its cycle began?",
    ),
    MetricSpec(
        "failed_selections_total",
        "counter",
        "selections",
        "How often did a selector fail, and how: it raised, scores were NaN or infinite, or a block had no index keys "
        "because making them had failed? The request goes on with the blocks it holds.",
        reasons=("exception", "not_finite", "not_indexed"),
    ),
    MetricSpec(
        "selection_latency_seconds",
        "histogram",
        "seconds",
        "How long after they were asked for do scores reach the planner, the steps of the set delay included?",
        bounds=SECONDS,
    ),
    MetricSpec(
        "selection_candidates_total",
        "counter",
        "blocks",
        "How many blocks could selections choose or leave?",
    ),
    MetricSpec(
        "selected_blocks_total",
        "counter",
        "blocks",
        "How many of these did they choose, by threshold and room? Over them: the selected share.",
    ),
    MetricSpec(
        "reselected_blocks_total",
        "counter",
        "blocks",
        "How many blocks did the selections after a request's first choose?",
    ),
    MetricSpec(
        "reselected_resident_blocks_total",
        "counter",
        "blocks",
        "How many of these did the request hold already? Over them: an estimate of the recall of the resident set, "
        "by the scores of the selection that follows it.",
    ),
    MetricSpec(
        "judged_prefetches_total",
        "counter",
        "blocks",
        "How many blocks had come into a set during decode when the request's next selection scored them again?",
    ),
    MetricSpec(
        "useful_prefetches_total",
        "counter",
        "blocks",
        "How many of these did that selection choose again? Over them: an estimate of the precision of prefetching.",
    ),
    MetricSpec(
        "block_lifetime_steps",
        "histogram",
        "steps",
        "How many steps was a block on the device when it was evicted?",
        bounds=STEPS,
    ),
    MetricSpec(
        "block_idle_steps",
        "histogram",
        "steps",
        "For how many steps had no request held a block when it was evicted?",
        bounds=STEPS,
    ),
    MetricSpec("late_recalls_total", "counter", "steps", "How many steps waited for a recall?"),
    MetricSpec(
        "stall_seconds_total", "counter", "seconds", "How long did steps wait for copies or scores, the device idle?"
    ),
    MetricSpec(
        "status_seconds_total",
        "counter",
        "seconds",
        "For how long did steps wait while the status page or its routes were told what is where?",
    ),
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
        "dense_fallbacks_total",
        "counter",
        "requests",
        "How often did a sparse request fall back to all its blocks, and why: too large a share of them worth a slot?",
        reasons=("score_share",),
    ),
    MetricSpec(
        "refused_dense_fallbacks_total",
        "counter",
        "selections",
        "After how many selections would a request have fallen back, had there been slots?",
    ),
    MetricSpec(
        "revoked_dense_fallbacks_total",
        "counter",
        "requests",
        "How often did a request that had fallen back become sparse again, because others needed the slots?",
    ),
    MetricSpec(
        "native_blocks_used",
        "gauge",
        "blocks",
        "How many blocks of windows and states do running requests hold on the device? 0 for a model without.",
        "scheduler",
    ),
    MetricSpec(
        "native_blocks_total",
        "gauge",
        "blocks",
        "How many blocks are there on the device for windows and states? 0 for a model without.",
        "scheduler",
    ),
    MetricSpec(
        "lost_prefix_tokens_total",
        "counter",
        "tokens",
        "How many tokens were computed again although host memory had their KV, because their windows or states were "
        "not on the device any more?",
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
# The values in the order of the counter files, each with its metric
SERIES = {key: spec for spec in METRICS for key in spec.series}

# Derived gauge: numerator and denominator
RATIOS = {"resident_ratio": ("resident_blocks", "total_blocks")}
