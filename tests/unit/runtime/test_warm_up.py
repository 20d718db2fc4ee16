"""Warm-up is no traffic: before the first request every counter is 0."""

from pathlib import Path

from flashmemory_vllm.observability.counters import CounterReader, CounterWriter, worker_name
from flashmemory_vllm.observability.metrics import SERIES
from flashmemory_vllm.residency.types import StepInput
from tests.unit.runtime.runtimes import TinyModel, small_budget


def test_nothing_is_counted_before_the_first_request(tmp_path: Path) -> None:
    with CounterWriter.create(tmp_path / "flashmemory-test-0", worker_name(0)) as counters:
        model = TinyModel(counters, small_budget(), 40, 60, selector="h2o")
        model.runtime.warm_up()
        model.step(StepInput(1, (), (), (), (), {}))
        values = CounterReader(counters.path.parent).read()
    assert {name: value for name, value in values.items() if value and SERIES[name].kind != "gauge"} == {}
