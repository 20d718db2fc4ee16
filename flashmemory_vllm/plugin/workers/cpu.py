"""The CPU worker: the "device" is a bounded tensor, the host pool another one."""

from typing import TYPE_CHECKING, Any

from vllm.v1.worker.cpu_worker import CPUWorker

from flashmemory_vllm.plugin import compat
from flashmemory_vllm.plugin.latent import runs_on_amx
from flashmemory_vllm.plugin.names import AMX_LATENT_BACKEND, CPU_LATENT_BACKEND
from flashmemory_vllm.plugin.workers.common import ResidencyWorker

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class FlashMemoryCpuWorker(ResidencyWorker, CPUWorker):
    """vLLM's CPU worker with a residency runtime."""

    def __init__(self, vllm_config: "VllmConfig", *args: Any, **kwargs: Any) -> None:
        """As vLLM's, which would otherwise ignore the selected backend."""
        on_amx = runs_on_amx(vllm_config.model_config)
        compat.override_cpu_backend(AMX_LATENT_BACKEND if on_amx else CPU_LATENT_BACKEND)
        super().__init__(vllm_config, *args, **kwargs)
