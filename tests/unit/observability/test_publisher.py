"""What Prometheus would scrape: real prometheus_client text, in one process and in its multiprocess mode."""

import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from flashmemory_vllm.observability.metrics import METRICS, PREFIX, SERIES, MetricSpec, series
from flashmemory_vllm.observability.publisher import MetricsPublisher

ZEROS = dict.fromkeys(SERIES, 0.0)

# One process publishes twice; then the files of the multiprocess mode are merged as vLLM's /metrics does
MULTIPROCESS = """
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest, multiprocess
from flashmemory_vllm.observability.metrics import SERIES
from flashmemory_vllm.observability.publisher import shared_publisher
zeros = dict.fromkeys(SERIES, 0.0)
for total in (5.0, 9.0):
    changed = {"evictions_total": total, "slots_used": total, "selection_latency_seconds_count": total}
    changed |= {f'selection_latency_seconds_bucket{{le="{end}"}}': total for end in ("5.0", "+Inf")}
    shared_publisher().publish({**zeros, **changed, "selection_latency_seconds_sum": 3 * total}, "m", "0")
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def _scrape(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    return _parse(generate_latest(registry).decode())


def _parse(text: str) -> dict[tuple[str, str], float]:
    """Value by sample name and engine."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, sample.labels["engine"]): sample.value for sample in samples}


def test_every_metric_of_the_table_is_scraped() -> None:
    registry = CollectorRegistry()
    MetricsPublisher(registry).publish(ZEROS, "m", "0")
    names = {name for name, _ in _scrape(registry)}
    assert {PREFIX + key.partition("{")[0] for key in SERIES} <= names


def test_types_and_labels_are_those_of_the_table() -> None:
    registry = CollectorRegistry()
    MetricsPublisher(registry).publish(ZEROS, "m", "0")
    text = generate_latest(registry).decode()
    for spec in METRICS:
        assert f"# TYPE {spec.full_name} {spec.kind}" in text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    scraped = {(sample.name, *sorted(sample.labels.items())): sample.value for sample in samples}
    for key, spec in SERIES.items():
        labels = {"model_name": "m", "engine": "0", **spec.series[key]}
        assert scraped[PREFIX + key.partition("{")[0], *sorted(labels.items())] == 0.0


def test_counters_show_the_total_however_often_it_is_published() -> None:
    registry = CollectorRegistry()
    publisher = MetricsPublisher(registry)
    for total in (5.0, 5.0, 12.0):
        publisher.publish({**ZEROS, "evictions_total": total}, "m", "0")
    assert _scrape(registry)["flashmemory:evictions_total", "0"] == 12


def test_counters_go_on_after_a_restart_of_the_writer() -> None:
    registry = CollectorRegistry()
    publisher = MetricsPublisher(registry)
    for total in (10.0, 4.0):
        publisher.publish({**ZEROS, "evictions_total": total}, "m", "0")
    assert _scrape(registry)["flashmemory:evictions_total", "0"] == 14


def test_gauges_show_the_value_now() -> None:
    registry = CollectorRegistry()
    publisher = MetricsPublisher(registry)
    for value in (10.0, 4.0):
        publisher.publish({**ZEROS, "slots_used": value}, "m", "0")
    assert _scrape(registry)["flashmemory:slots_used", "0"] == 4


def test_reasons_are_counted_apart() -> None:
    registry = CollectorRegistry()
    publisher = MetricsPublisher(registry)
    for count in (2.0, 3.0):
        key = series("requests_dense_total", "mode_pressure")
        publisher.publish({**ZEROS, "requests_sparse_total": 1.0, key: count}, "m", "0")
    common = {"model_name": "m", "engine": "0"}
    name = "flashmemory:requests_dense_total"
    assert registry.get_sample_value(name, {**common, "reason": "mode_pressure"}) == 3
    assert registry.get_sample_value(name, {**common, "reason": "ratio_keeps_all"}) == 0
    assert registry.get_sample_value("flashmemory:requests_sparse_total", common) == 1


def steps_histogram(counts: list[int], total: float) -> dict[str, float]:
    """What the reader gives of `block_idle_steps`, whose buckets have so many values each."""
    *buckets, count, sum_of_values = next(spec for spec in METRICS if spec.name == "block_idle_steps").series
    reached = dict(zip(buckets, accumulate(counts), strict=True))
    return {**ZEROS, **reached, count: sum(counts), sum_of_values: total}


@pytest.mark.parametrize(
    ("second", "expected", "total"),
    [
        ([1, 3, 0, 0, 0, 0, 0, 0, 2], [1, 4, 4, 4, 4, 4, 4, 4, 6], 50.0),
        # A restarted writer counts from zero
        ([1, 0, 0, 0, 0, 0, 0, 0, 0], [2, 4, 4, 4, 4, 4, 4, 4, 5], 90.0),
    ],
    ids=["more", "restarted"],
)
def test_histograms_show_all_values_however_often_they_are_published(
    second: list[int], expected: list[int], total: float
) -> None:
    registry = CollectorRegistry()
    publisher = MetricsPublisher(registry)
    first = steps_histogram([1, 2, 0, 0, 0, 0, 0, 0, 1], 40.0)
    for values in (first, first, steps_histogram(second, 50.0)):
        publisher.publish(values, "m", "0")
    (family,) = [family for family in registry.collect() if family.name == "flashmemory:block_idle_steps"]
    samples = family.samples
    assert family.type == "histogram"
    assert [sample.value for sample in samples if sample.name.endswith("_bucket")] == expected
    assert [sample.value for sample in samples if sample.name.endswith("_count")] == expected[-1:]
    assert [sample.value for sample in samples if sample.name.endswith("_sum")] == [total]


def test_engines_do_not_mix() -> None:
    registry = CollectorRegistry()
    publisher = MetricsPublisher(registry)
    publisher.publish({**ZEROS, "evictions_total": 3.0}, "m", "0")
    publisher.publish({**ZEROS, "evictions_total": 8.0}, "m", "1")
    scraped = _scrape(registry)
    assert scraped["flashmemory:evictions_total", "0"] == 3
    assert scraped["flashmemory:evictions_total", "1"] == 8


def test_an_engine_of_which_nothing_can_be_read_has_no_workers() -> None:
    """Its gauges must not keep the last values, and its counters must not be counted again when it is back."""
    registry = CollectorRegistry()
    publisher = MetricsPublisher(registry)
    publisher.publish({}, "m", "1")
    seen = {**ZEROS, "workers": 1.0, "slots_used": 5.0, "evictions_total": 5.0}
    for values in (seen, {}, {}, {**seen, "evictions_total": 6.0}, {}):
        publisher.publish(values, "m", "0")
    scraped = _scrape(registry)
    gauges = {spec.full_name for spec in METRICS if spec.kind == "gauge"}
    assert {scraped[name, engine] for name in gauges for engine in "01"} == {0.0}
    assert scraped["flashmemory:evictions_total", "0"] == 6
    assert {name for name, engine in scraped if engine == "1"} == gauges


def test_in_multiprocess_mode_values_are_right(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", MULTIPROCESS], env=environment, capture_output=True, text=True, check=True
    )
    scraped = _parse(run.stdout)
    assert scraped["flashmemory:evictions_total", "0"] == 9
    assert scraped["flashmemory:slots_used", "0"] == 9
    assert scraped["flashmemory:selection_latency_seconds_count", "0"] == 9
    assert scraped["flashmemory:selection_latency_seconds_sum", "0"] == 27
    assert 'selection_latency_seconds_bucket{engine="0",le="2.5",model_name="m"} 0.0' in run.stdout
    assert 'selection_latency_seconds_bucket{engine="0",le="5.0",model_name="m"} 9.0' in run.stdout


@pytest.mark.parametrize("spec", METRICS, ids=lambda spec: spec.name)
def test_every_counter_is_called_total(spec: MetricSpec) -> None:
    assert spec.kind != "counter" or spec.name.endswith("_total")


@pytest.mark.parametrize("spec", [spec for spec in METRICS if spec.kind == "histogram"], ids=lambda spec: spec.name)
def test_every_histogram_is_called_by_its_unit(spec: MetricSpec) -> None:
    assert spec.name.endswith(f"_{spec.unit}")
    assert list(spec.bounds) == sorted(spec.bounds)
