"""Our stat logger as vLLM loads and calls it."""

import inspect
import shutil
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.v1.metrics.loggers import StatLoggerBase, load_stat_logger_plugin_factories

from flashmemory_vllm.observability.counters import CounterWriter, worker_name
from flashmemory_vllm.plugin.counter_files import engine_counters_directory
from flashmemory_vllm.plugin.stat_logger import PUBLISH_INTERVAL_SECONDS, FlashMemoryStatLogger
from tests.integration.plugin.engines import make_vllm_config

# The registry outlives a test: each test publishes as an engine of its own
ENGINES = count()


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Index of an engine whose counters nobody has published yet."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return next(ENGINES)


@pytest.fixture
def worker(engine: int) -> Iterator[CounterWriter]:
    """The counters of that engine's one worker."""
    with CounterWriter.create(engine_counters_directory(make_vllm_config(), engine), worker_name(0)) as writer:
        yield writer


def _scraped(engine: int, name: str = "slots_used") -> float | None:
    return REGISTRY.get_sample_value(f"flashmemory:{name}", {"model_name": "m", "engine": str(engine)})


def _stats(*finished: object) -> Any:
    return SimpleNamespace(finished_requests=list(finished))


def test_vllm_accepts_it() -> None:
    assert FlashMemoryStatLogger in load_stat_logger_plugin_factories()


@pytest.mark.parametrize("method", ["record", "log", "log_engine_initialized"])
def test_signatures_are_vllms(method: str) -> None:
    ours, theirs = (inspect.signature(getattr(cls, method)) for cls in (FlashMemoryStatLogger, StatLoggerBase))
    assert list(ours.parameters) == list(theirs.parameters)


def test_sizes_are_published_at_start(engine: int, worker: CounterWriter) -> None:
    worker.set("slots_used", 3)
    FlashMemoryStatLogger(make_vllm_config(), engine).log_engine_initialized()
    assert _scraped(engine) == 3


def test_steps_in_quick_succession_publish_once_but_a_finished_request_always(
    engine: int, worker: CounterWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    logger = FlashMemoryStatLogger(make_vllm_config(), engine)
    for slots_used, stats, published in ((1, _stats(), 1), (2, _stats(), 1), (3, _stats("request"), 3)):
        worker.set("slots_used", slots_used)
        logger.record(None, stats)
        assert _scraped(engine) == published
    worker.set("slots_used", 4)
    now += PUBLISH_INTERVAL_SECONDS
    logger.record(None, _stats())
    assert _scraped(engine) == 4


def test_an_idle_server_publishes_what_came_after_the_last_step(engine: int, worker: CounterWriter) -> None:
    logger = FlashMemoryStatLogger(make_vllm_config(), engine)
    logger.record(None, None)
    worker.set("slots_used", 9)
    logger.log()
    assert _scraped(engine) == 9


def test_the_folder_vanishes_under_a_living_server(engine: int, worker: CounterWriter) -> None:
    """A logout removes it: the server's own values go on, and who cannot read any says that there are no workers."""
    logger = FlashMemoryStatLogger(make_vllm_config(), engine)
    shutil.rmtree(worker.path.parent)
    worker.set("workers", 1)
    worker.set("slots_used", 4)
    logger.log()
    assert (_scraped(engine), _scraped(engine, "workers")) == (4, 1)
    FlashMemoryStatLogger(make_vllm_config(), engine).log()
    assert (_scraped(engine), _scraped(engine, "workers")) == (0, 0)


@pytest.mark.parametrize(
    "config",
    [make_vllm_config(backend="FLASH_ATTN"), make_vllm_config(api_process_count=2, api_process_rank=1)],
    ids=["other backend", "second API server"],
)
def test_it_stays_silent(engine: int, worker: CounterWriter, config: Any) -> None:
    worker.set("slots_used", 3)
    logger = FlashMemoryStatLogger(config, engine)
    logger.log_engine_initialized()
    logger.record(None, _stats("request"))
    assert _scraped(engine) is None
