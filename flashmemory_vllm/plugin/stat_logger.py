"""Brings our counters onto `/metrics`: vLLM calls this after engine steps, in its API server."""

import time
from typing import TYPE_CHECKING

from vllm.v1.metrics.loggers import StatLoggerBase

from flashmemory_vllm.observability.counters import CounterReader
from flashmemory_vllm.observability.publisher import shared_publisher
from flashmemory_vllm.plugin.checks import is_selected
from flashmemory_vllm.plugin.counter_files import engine_counters_directory

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

# Steps may take less than a millisecond; nobody scrapes more often than this
PUBLISH_INTERVAL_SECONDS = 0.25


class FlashMemoryStatLogger(StatLoggerBase):
    """Publishes the counters of one engine; does nothing when the engine runs another backend.

    vLLM makes one for each engine and API server. Of several API servers only the first publishes, because
    Prometheus adds up the counters of all of them.
    """

    def __init__(self, vllm_config: "VllmConfig", engine_index: int = 0) -> None:
        self._reader: CounterReader | None = None
        if is_selected(vllm_config) and vllm_config.parallel_config._api_process_rank == 0:
            self._reader = CounterReader(engine_counters_directory(vllm_config, engine_index))
        self._model_name = str(vllm_config.model_config.served_model_name)
        self._engine = str(engine_index)
        self._next_publish = 0.0

    def record(
        self,
        scheduler_stats: "SchedulerStats | None",  # noqa: ARG002 - vLLM's signature
        iteration_stats: "IterationStats | None",
        mm_cache_stats: "MultiModalCacheStats | None" = None,  # noqa: ARG002
        engine_idx: int = 0,  # noqa: ARG002
    ) -> None:
        """Publish now and then, and always when a request has finished, so that its last steps are seen."""
        finished = iteration_stats is not None and bool(iteration_stats.finished_requests)
        if finished or time.monotonic() >= self._next_publish:
            self._publish()

    def log(self) -> None:
        """Publish what was counted after the last step; vLLM calls this every few seconds."""
        self._publish()

    def log_engine_initialized(self) -> None:
        """Publish the sizes that are known before the first request."""
        self._publish()

    def _publish(self) -> None:
        self._next_publish = time.monotonic() + PUBLISH_INTERVAL_SECONDS
        if self._reader is not None:
            shared_publisher().publish(self._reader.read(), self._model_name, self._engine)
