"""The names under which vLLM finds our classes."""

BACKEND_NAME = "FLASHMEMORY"
CPU_BACKEND = "flashmemory_vllm.plugin.backends.cpu.FlashMemoryCpuBackend"
CPU_LATENT_BACKEND = "flashmemory_vllm.plugin.backends.cpu_latent.FlashMemoryCpuLatentBackend"
CUDA_BACKEND = "flashmemory_vllm.plugin.backends.cuda.FlashMemoryCudaBackend"
CAPTURE_EXTENSION = "flashmemory_vllm.plugin.capture_worker.CaptureExtension"
CPU_WORKER = "flashmemory_vllm.plugin.workers.cpu.FlashMemoryCpuWorker"
CUDA_WORKER = "flashmemory_vllm.plugin.workers.cuda.FlashMemoryCudaWorker"
