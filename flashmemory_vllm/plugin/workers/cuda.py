"""The CUDA worker."""

from vllm.v1.worker.gpu_worker import Worker

from flashmemory_vllm.plugin.workers.common import ResidencyWorker


class FlashMemoryCudaWorker(ResidencyWorker, Worker):
    """vLLM's GPU worker with a residency runtime."""
