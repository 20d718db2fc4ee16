"""The names under which vLLM finds our classes."""

BACKEND_NAME = "FLASHMEMORY"
CPU_BACKEND = "flashmemory_vllm.plugin.backends.cpu.FlashMemoryCpuBackend"
CUDA_BACKEND = "flashmemory_vllm.plugin.backends.cuda.FlashMemoryCudaBackend"
CPU_WORKER = "flashmemory_vllm.plugin.workers.cpu.FlashMemoryCpuWorker"
CUDA_WORKER = "flashmemory_vllm.plugin.workers.cuda.FlashMemoryCudaWorker"
