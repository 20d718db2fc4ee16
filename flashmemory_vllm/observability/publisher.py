"""Puts the counters of engines onto the Prometheus registry of the API server."""

from collections.abc import Mapping
from functools import cache
from itertools import pairwise

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from flashmemory_vllm.observability.metrics import METRICS, MetricSpec


class TotalsHistogram(Histogram):
    """A histogram that takes counts of values where the client's own takes the values one by one."""

    def grow(self, counts: list[float], total: float) -> None:
        """Add values.

        Args:
            counts: how many fell into each bucket, the one without an end last.
            total: their sum.
        """
        self._sum.inc(total)
        for bucket, count in zip(self._buckets, counts, strict=True):
            bucket.inc(count)


class MetricsPublisher:
    """Owns one Prometheus object for each metric of the table.

    Values come as totals while a Prometheus counter only takes increments, so the last totals are kept for
    each engine. In Prometheus' multiprocess mode the counters of all processes are added up: exactly one
    process may publish.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, TotalsHistogram] = {}
        for spec in METRICS:
            text = f"{spec.question} Unit: {spec.unit}."
            if spec.kind == "counter":
                self._counters[spec.name] = Counter(spec.full_name, text, spec.labels, registry=registry)
            elif spec.kind == "histogram":
                self._histograms[spec.name] = TotalsHistogram(
                    spec.full_name, text, spec.labels, registry=registry, buckets=spec.bounds
                )
            else:
                self._gauges[spec.name] = Gauge(
                    spec.full_name, text, spec.labels, registry=registry, multiprocess_mode="mostrecent"
                )
        self._last_totals: dict[tuple[str, ...], Mapping[str, float]] = {}

    def publish(self, values: Mapping[str, float], model_name: str, engine: str) -> None:
        """Bring the metrics of one engine up to date.

        Args:
            values: value by name of a series without the prefix, as `CounterReader.read` gives it. Empty when no
                worker can be read: the sums over none are 0, and counters stay as they are.
            model_name: label, as on vLLM's own metrics.
            engine: label, index of the engine.
        """
        engine_labels = (model_name, engine)
        if not values:
            for gauge in self._gauges.values():
                gauge.labels(*engine_labels).set(0.0)
            return
        last_totals = self._last_totals.get(engine_labels, {})
        for spec in METRICS:
            if spec.kind == "gauge":
                self._gauges[spec.name].labels(*engine_labels).set(values[spec.name])
            elif spec.kind == "histogram":
                counts, total = _growth_by_bucket(spec, values, last_totals)
                self._histograms[spec.name].labels(*engine_labels).grow(counts, total)
            else:
                for key, labels in spec.series.items():
                    counter = self._counters[spec.name].labels(*engine_labels, *labels.values())
                    counter.inc(_growth(values[key], last_totals.get(key, 0.0)))
        self._last_totals[engine_labels] = values


def _growth(total: float, last_total: float) -> float:
    """What came on top; a total that fell was counted anew from zero by a restarted writer."""
    return total - last_total if total >= last_total else total


def _growth_by_bucket(
    spec: MetricSpec, values: Mapping[str, float], last_totals: Mapping[str, float]
) -> tuple[list[float], float]:
    """What came on top in each bucket alone, and in the sum."""
    *buckets, count, total = spec.series
    is_restarted = values[count] < last_totals.get(count, 0.0)
    last_totals = {} if is_restarted else last_totals
    reaching = [0.0, *(values[key] - last_totals.get(key, 0.0) for key in buckets)]
    return [upper - lower for lower, upper in pairwise(reaching)], values[total] - last_totals.get(total, 0.0)


@cache
def shared_publisher() -> MetricsPublisher:
    """The publisher of this process, on the registry that vLLM serves at `/metrics`."""
    return MetricsPublisher(REGISTRY)
