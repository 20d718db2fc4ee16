"""The CPU worker: the "device" is a bounded tensor, the host pool another one."""

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from flashmemory_vllm.plugin import compat
from flashmemory_vllm.plugin.workers.common import ResidencyWorker


class FlashMemoryCpuWorker(ResidencyWorker, CPUWorker):
    """vLLM's CPU worker with a residency runtime."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's, which would otherwise ignore the selected backend."""
        compat.override_cpu_backend()
        super().__init__(*args, **kwargs)
