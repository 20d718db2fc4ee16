"""The reporter brings the planner's and the engine's totals into the worker's counter file."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from flashmemory_vllm.observability.counters import CounterReader, CounterWriter, worker_name
from flashmemory_vllm.observability.metrics import SERIES, series
from flashmemory_vllm.residency.counters import SECOND_BOUNDS, STEP_BOUNDS
from flashmemory_vllm.residency.planner import StepPlanner
from flashmemory_vllm.runtime.choices import ChoiceQueue
from flashmemory_vllm.runtime.report import HISTOGRAM_STEPS, MANY_REQUESTS, MANY_STEPS, Reporter
from flashmemory_vllm.transfer.engine import TransferCounters, TransferEngine
from tests.unit.residency.driver import Driver

# The reporter reads nothing else of an engine and of a choice queue
ENGINE = SimpleNamespace(counters=TransferCounters(bytes_h2d=5, stall_seconds=1.0))
CHOICES = SimpleNamespace(stall_seconds=0.5, failures={"exception": 2})


@pytest.fixture
def counters(tmp_path: Path) -> Iterator[CounterWriter]:
    with CounterWriter.create(tmp_path / "flashmemory-test-0", worker_name(0)) as writer:
        yield writer


def report(counters: CounterWriter, planner: StepPlanner) -> Reporter:
    return Reporter(counters, planner, cast(TransferEngine, ENGINE), cast(ChoiceQueue, CHOICES))


def read(counters: CounterWriter) -> dict[str, float]:
    return CounterReader(counters.path.parent).read()


def busy_driver() -> Driver:
    """A request that was selected for twice and still runs."""
    driver = Driver(ratio=0.4, tau=9)
    driver.prefill("a", 12)
    for best in ([3, 5, 7], [9, 5, 10]):
        driver.offer("a", 12, best)
        driver.step(a=1)
    return driver


def falling_back_driver() -> Driver:
    """A request that falls back, and one that would."""
    driver = Driver(num_slots=16, fallback_share=0.5)
    for name, first_block in (("a", 1), ("b", 30)):
        driver.prefill(name, 12, first_block=first_block)
        for _ in range(2):
            driver.offer(name, 12, [3])
            driver.step(tokens={name: 1})
    return driver


def test_the_ranges_counted_are_the_buckets_published() -> None:
    assert SERIES["block_idle_steps_sum"].bounds == SERIES["block_lifetime_steps_sum"].bounds == STEP_BOUNDS
    assert SERIES["selection_latency_seconds_sum"].bounds == SECOND_BOUNDS


def test_totals_are_published_once(counters: CounterWriter) -> None:
    driver = busy_driver()
    reporter = report(counters, driver.planner)
    for _ in range(3):
        reporter.publish()
    values, counted = read(counters), driver.planner.counters
    assert values["workers"] == 1
    assert values["recalled_bytes_total"] == 5
    assert values["stall_seconds_total"] == 1.5
    assert values['failed_selections_total{reason="exception"}'] == 2
    assert values["selections_total"] == counted.selections == 2
    assert values["selected_blocks_total"] == counted.selected_blocks == 6
    assert values["selection_candidates_total"] == counted.selection_candidates == 22
    assert values["reselected_blocks_total"] == counted.reselected_blocks == 3
    assert values["reselected_resident_blocks_total"] == counted.reselected_resident_blocks == 1


def test_totals_of_a_new_runtime_come_on_top(counters: CounterWriter) -> None:
    for _ in range(2):
        report(counters, busy_driver().planner).publish()
    values = read(counters)
    assert (values["selections_total"], values["stall_seconds_total"]) == (4, 3.0)


def test_fallbacks_are_published(counters: CounterWriter) -> None:
    driver = falling_back_driver()
    report(counters, driver.planner).publish()
    values, counted = read(counters), driver.planner.counters
    assert values[series("dense_fallbacks_total", "score_share")] == counted.fallbacks == 1
    assert values["refused_dense_fallbacks_total"] == counted.refused_fallbacks == 1
    assert values["revoked_dense_fallbacks_total"] == counted.revoked_fallbacks == 1


def test_histograms_follow_every_so_many_steps(counters: CounterWriter) -> None:
    driver = busy_driver()
    reporter = report(counters, driver.planner)
    driver.planner.counters.block_idle_steps.observe(np.array([3.0, 70.0]))
    for _ in range(HISTOGRAM_STEPS - 1):
        reporter.publish()
    assert read(counters)["block_idle_steps_count"] == 0
    for _ in range(2 * HISTOGRAM_STEPS):
        reporter.publish()
    values = read(counters)
    assert (values["block_idle_steps_count"], values["block_idle_steps_sum"]) == (2, 73.0)
    assert values['block_idle_steps_bucket{le="4.0"}'] == 1


def test_an_idle_server_has_published_all(counters: CounterWriter) -> None:
    driver = busy_driver()
    reporter = report(counters, driver.planner)
    driver.planner.counters.block_idle_steps.observe(np.array([3.0]))
    driver.step(finished=["a"])
    reporter.publish()
    assert read(counters)["block_idle_steps_count"] == 1


def test_with_many_requests_counters_are_written_now_and_then_and_at_the_end(counters: CounterWriter) -> None:
    driver = Driver(num_slots=300)
    reporter = report(counters, driver.planner)
    names = [f"r{index}" for index in range(MANY_REQUESTS)]
    for index, name in enumerate(names):
        driver.prefill(name, 1, first_block=1 + 2 * index)
    written = []
    for step in range(2 * MANY_STEPS):
        driver.planner.counters.selections = step + 1
        reporter.publish()
        written.append(int(read(counters).get("selections_total", 0)))
    assert written == [*[0] * (MANY_STEPS - 1), *[MANY_STEPS] * MANY_STEPS, 2 * MANY_STEPS]
    driver.planner.counters.selections += 1
    driver.step(finished=names)
    reporter.publish()
    assert read(counters)["selections_total"] == 2 * MANY_STEPS + 1
