"""What Prometheus would scrape: real prometheus_client text, in one process and in its multiprocess mode."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from flashmemory_vllm.observability.metrics import METRICS, SERIES, MetricSpec, series
from flashmemory_vllm.observability.publisher import MetricsPublisher

ZEROS = dict.fromkeys(SERIES, 0.0)

# One process publishes twice; then the files of the multiprocess mode are merged as vLLM's /metrics does
MULTIPROCESS = """
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest, multiprocess
from flashmemory_vllm.observability.metrics import SERIES
from flashmemory_vllm.observability.publisher import shared_publisher
zeros = dict.fromkeys(SERIES, 0.0)
for total in (5.0, 9.0):
    shared_publisher().publish({**zeros, "evictions_total": total, "slots_used": total}, "m", "0")
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
    assert {spec.full_name for spec in METRICS} <= names


def test_types_and_labels_are_those_of_the_table() -> None:
    registry = CollectorRegistry()
    MetricsPublisher(registry).publish(ZEROS, "m", "0")
    text = generate_latest(registry).decode()
    for spec in METRICS:
        assert f"# TYPE {spec.full_name} {spec.kind}" in text
        for reason in ("", *(f',reason="{reason}"' for reason in spec.reasons))[bool(spec.reasons) :]:
            assert f'{spec.full_name}{{engine="0",model_name="m"{reason}}} 0.0' in text


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


def test_engines_do_not_mix() -> None:
    registry = CollectorRegistry()
    publisher = MetricsPublisher(registry)
    publisher.publish({**ZEROS, "evictions_total": 3.0}, "m", "0")
    publisher.publish({**ZEROS, "evictions_total": 8.0}, "m", "1")
    scraped = _scrape(registry)
    assert scraped["flashmemory:evictions_total", "0"] == 3
    assert scraped["flashmemory:evictions_total", "1"] == 8


def test_nothing_is_published_of_an_engine_without_workers() -> None:
    registry = CollectorRegistry()
    MetricsPublisher(registry).publish({}, "m", "0")
    assert _scrape(registry) == {}


def test_in_multiprocess_mode_values_are_right(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", MULTIPROCESS], env=environment, capture_output=True, text=True, check=True
    )
    scraped = _parse(run.stdout)
    assert scraped["flashmemory:evictions_total", "0"] == 9
    assert scraped["flashmemory:slots_used", "0"] == 9


@pytest.mark.parametrize("spec", METRICS, ids=lambda spec: spec.name)
def test_every_counter_is_called_total(spec: MetricSpec) -> None:
    assert spec.kind == "gauge" or spec.name.endswith("_total")
