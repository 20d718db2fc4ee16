"""Where the counters of an engine are, seen from any of vLLM's processes."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from flashmemory_vllm.observability.counters import engine_directory

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ENGINE_ID_ENV = "FLASHMEMORY_ENGINE_ID"

_LAUNCHER_RANK = -1


def announce_engine(vllm_config: "VllmConfig") -> None:
    """Tell the API servers that this process is about to start which engine is theirs.

    With several API servers each builds a configuration, and so an instance id, of its own; the one that the
    engines get is the launcher's. The environment is all that they inherit from it. With one API server
    nothing is needed.

    Args:
        vllm_config: the configuration that this process has just built.
    """
    if vllm_config.parallel_config._api_process_rank == _LAUNCHER_RANK:
        os.environ[ENGINE_ID_ENV] = vllm_config.instance_id


def engine_counters_directory(vllm_config: "VllmConfig", engine_index: int | None = None) -> Path:
    """Directory of the shared counters of one engine.

    Args:
        vllm_config: configuration of the API server, the engine core or the worker that asks.
        engine_index: data-parallel index of the engine. Default: the one this process belongs to.

    Returns:
        The same path in every process of the engine on this machine.
    """
    parallel = vllm_config.parallel_config
    if engine_index is None:
        engine_index = parallel.data_parallel_index
    engine_id = vllm_config.instance_id
    if parallel._api_process_count > 1 and parallel._api_process_rank != _LAUNCHER_RANK:
        engine_id = os.environ.get(ENGINE_ID_ENV, engine_id)
    # Ray tells the engines of one server apart by this suffix, which only they know of
    return engine_directory(engine_id.removesuffix(f"_dp{engine_index}"), engine_index)
