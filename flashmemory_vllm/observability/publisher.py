"""Puts the counters of engines onto the Prometheus registry of the API server."""

from collections.abc import Mapping
from functools import cache

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from flashmemory_vllm.observability.metrics import METRICS, SERIES


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
            values: value by name of a series without the prefix, as `CounterReader.read` gives it; empty publishes
                nothing.
            model_name: label, as on vLLM's own metrics.
            engine: label, index of the engine.
        """
        if not values:
            return
        last_totals = self._last_totals.get((model_name, engine), {})
        for key, spec in SERIES.items():
            labels = (model_name, engine, *spec.series[key])
            if spec.kind == "counter":
                growth = values[key] - last_totals.get(key, 0.0)
                # A total that fell was counted anew from zero by a restarted writer
                self._counters[spec.name].labels(*labels).inc(growth if growth >= 0 else values[key])
            else:
                self._gauges[spec.name].labels(*labels).set(values[key])
        self._last_totals[model_name, engine] = values


@cache
def shared_publisher() -> MetricsPublisher:
    """The publisher of this process, on the registry that vLLM serves at `/metrics`."""
    return MetricsPublisher(REGISTRY)
