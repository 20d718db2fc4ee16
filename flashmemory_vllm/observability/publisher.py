"""Puts the counters of engines onto the Prometheus registry of the API server."""

from collections.abc import Mapping
from functools import cache

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from flashmemory_vllm.observability.metrics import LABELS, METRICS


class MetricsPublisher:
    """Owns one Prometheus object for each metric of the table.

    Values come as totals while a Prometheus counter only takes increments, so the last totals are kept for
    each engine. In Prometheus' multiprocess mode the counters of all processes are added up: exactly one
    process may publish.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        for spec in METRICS:
            text = f"{spec.question} Unit: {spec.unit}."
            if spec.kind == "counter":
                self._counters[spec.name] = Counter(spec.full_name, text, spec.labels, registry=registry)
            else:
                self._gauges[spec.name] = Gauge(
                    spec.full_name, text, spec.labels, registry=registry, multiprocess_mode="mostrecent"
                )
        self._last_totals: dict[tuple[str, ...], Mapping[str, float]] = {}

    def publish(self, values: Mapping[str, float], model_name: str, engine: str) -> None:
        """Bring the metrics of one engine up to date.

        Args:
            values: value by metric name without the prefix, as `CounterReader.read` gives it; empty publishes
                nothing.
            model_name: label, as on vLLM's own metrics.
            engine: label, index of the engine.
        """
        if not values:
            return
        labels = dict(zip(LABELS, (model_name, engine), strict=True))
        last_totals = self._last_totals.get((model_name, engine), {})
        for name, counter in self._counters.items():
            growth = values[name] - last_totals.get(name, 0.0)
            # A total that fell was counted anew from zero by a restarted writer
            counter.labels(**labels).inc(growth if growth >= 0 else values[name])
        for name, gauge in self._gauges.items():
            gauge.labels(**labels).set(values[name])
        self._last_totals[model_name, engine] = values


@cache
def shared_publisher() -> MetricsPublisher:
    """The publisher of this process, on the registry that vLLM serves at `/metrics`."""
    return MetricsPublisher(REGISTRY)
