"""Stand-ins for vLLM's configuration of one engine, with what our border reads of it."""

from types import SimpleNamespace
from typing import Any

from flashmemory_vllm.plugin.names import BACKEND_NAME


def make_vllm_config(
    instance_id: str = "42",
    backend: str = BACKEND_NAME,
    api_process_count: int = 1,
    api_process_rank: int = 0,
) -> Any:
    """Make a configuration.

    Args:
        instance_id: of the process that built it.
        backend: name of the attention backend.
        api_process_count: API servers.
        api_process_rank: which of them, or -1 in the launcher and the engines.
    """
    return SimpleNamespace(
        instance_id=instance_id,
        attention_config=SimpleNamespace(backend=SimpleNamespace(name=backend)),
        model_config=SimpleNamespace(served_model_name="m"),
        parallel_config=SimpleNamespace(
            data_parallel_size=1,
            data_parallel_index=0,
            _api_process_count=api_process_count,
            _api_process_rank=api_process_rank,
        ),
    )
