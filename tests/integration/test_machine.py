"""Engines that share a machine share its host memory; engines on several machines are refused.

Configurations are built as `vllm serve` does; no engine is started.
"""

import pickle
from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig

from flashmemory_vllm.errors import ConfigError, UnsupportedError
from flashmemory_vllm.host_memory import HostMemory
from flashmemory_vllm.plugin import sizing
from flashmemory_vllm.plugin.checks import prepare_config, read_config
from flashmemory_vllm.runtime.capacity import CapacityPlan
from tests.integration.configurations import configure, refusal

GIB = 1 << 30

pytestmark = pytest.mark.usefixtures("plugin_here")


@pytest.fixture(autouse=True)
def _free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "available_host_bytes", lambda: HostMemory(6 * GIB // 10, "a test"))


def in_worker(config: VllmConfig) -> VllmConfig:
    """The configuration as a worker of a data-parallel engine gets it: its engine core made it an independent one."""
    config = pickle.loads(pickle.dumps(config))  # noqa: S301 - as vLLM hands it over
    config.parallel_config.data_parallel_index = config.parallel_config.data_parallel_size - 1
    config.parallel_config.reconfigure_for_independent_dp_rank()
    return config


def plan(config: VllmConfig) -> CapacityPlan:
    """What one worker plans, whose device has room for anything."""
    config.cache_config.kv_cache_memory_bytes = 100 * GIB
    shape = sizing._announced_shape(config)
    options = read_config(config)
    return sizing._plan(config, options, shape, sizing.budget_policy(config, options, shape.block_size), 100 * GIB)


def pinned_bytes(config: VllmConfig) -> int:
    """What all workers of the machine pin together."""
    workers: int = config.parallel_config.data_parallel_size * config.parallel_config.world_size
    return workers * plan(in_worker(config)).host_bytes


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
@pytest.mark.parametrize("data_parallel_size", [1, 3])
@pytest.mark.parametrize(("options", "share"), [({}, 3 * GIB // 10), ({"host_memory_gib": 0.25}, GIB // 4)])
def test_host_memory_is_for_all_workers_of_the_machine(
    llama: Path, options: dict[str, Any], share: int, data_parallel_size: int, tensor_parallel_size: int
) -> None:
    sizes = {"data_parallel_size": data_parallel_size, "tensor_parallel_size": tensor_parallel_size}
    config = configure(llama, options, **sizes)
    assert 0.95 * share < pinned_bytes(config) <= share


def test_an_engine_is_not_refused_for_what_others_took(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines start one after the other: the last finds only its own share free."""
    config = configure(llama, {"host_memory_gib": 0.375}, data_parallel_size=3)
    monkeypatch.setattr(sizing, "available_host_bytes", lambda: HostMemory(GIB // 8, "what is left"))
    assert plan(in_worker(config)).host_bytes > 0.95 * GIB // 8
    monkeypatch.setattr(sizing, "available_host_bytes", lambda: HostMemory(GIB // 8 - 1, "what is left"))
    with pytest.raises(ConfigError, match=r"host_memory_gib: 0\.375 given, of which 0\.12 for this engine"):
        plan(in_worker(config))


def test_the_number_of_engines_is_told_once(llama: Path) -> None:
    """A configuration that is built again, where the number is not known any more, keeps what was told."""
    options: dict[str, Any] = {"host_memory_gib": 0.25}
    config = in_worker(configure(llama, options, data_parallel_size=3))
    prepare_config(config)
    assert plan(config).host_bytes <= GIB // 12
    assert options == {"host_memory_gib": 0.25}


SEVERAL_MACHINES: list[tuple[dict[str, Any], str]] = [
    ({"nnodes": 2, "tensor_parallel_size": 2}, "--nnodes: 2"),
    ({"data_parallel_size": 2, "data_parallel_size_local": 1}, "--data-parallel-size-local: 1 of 2 engines"),
    (
        {"data_parallel_size": 4, "data_parallel_size_local": 2, "data_parallel_hybrid_lb": True},
        "--data-parallel-hybrid-lb: set",
    ),
]


@pytest.mark.parametrize(("engine", "given"), SEVERAL_MACHINES, ids=lambda value: str(value)[:30])
def test_several_machines_are_refused(llama: Path, engine: dict[str, Any], given: str) -> None:
    error = refusal(llama, **engine)
    assert isinstance(error, UnsupportedError)
    assert str(error).startswith(f"{given} is not supported with --attention-backend flashmemory; allowed: ")


@pytest.mark.parametrize(
    ("changed", "given"),
    [
        ({"data_parallel_external_lb": True}, "--data-parallel-external-lb: set, or by --data-parallel-rank"),
        ({"data_parallel_backend": "ray"}, "--data-parallel-backend: ray"),
        ({"distributed_executor_backend": "ray"}, "--distributed-executor-backend: ray"),
        ({"distributed_executor_backend": "external_launcher"}, "--distributed-executor-backend: external_launcher"),
    ],
)
def test_what_may_spread_over_machines_is_refused(llama: Path, changed: dict[str, Any], given: str) -> None:
    """VLLM takes these only for other models or with Ray at hand, so we are asked directly."""
    config = configure(llama)
    for name, value in changed.items():
        setattr(config.parallel_config, name, value)
    with pytest.raises(UnsupportedError) as caught:
        prepare_config(config)
    assert str(caught.value).startswith(f"{given} is not supported")
