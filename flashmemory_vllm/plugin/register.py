"""Registers the flashmemory attention backend with vLLM.

vLLM calls `register` through the general-plugin entry point in every process: the API server (before the
command line is parsed), the engine core, each worker, and the model-inspection subprocess. It must
therefore be idempotent and cheap: no model code is imported, no device is touched.
"""

from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from flashmemory_vllm.plugin import compat

logger = init_logger(__name__)

BACKEND_NAME = "FLASHMEMORY"
CUDA_BACKEND_PATH = "flashmemory_vllm.plugin.backends.cuda.FlashMemoryCudaBackend"


def register() -> None:
    """Make `--attention-backend flashmemory` known to this process.

    Raises:
        UnsupportedError: the installed vLLM is not a version this plugin was written for.
    """
    compat.check_vllm_version()
    backend_member()
    compat.wrap_platform_config_check()


def backend_member() -> AttentionBackendEnum:
    """Return vLLM's enum member for this backend, registering it on first use."""
    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, CUDA_BACKEND_PATH)
        compat.make_enum_member_picklable(AttentionBackendEnum[BACKEND_NAME], backend_member)
    return AttentionBackendEnum[BACKEND_NAME]
