"""Registers the flashmemory attention backend with vLLM.

vLLM calls `register` through the general-plugin entry point in every process: the API server (before the
command line is parsed), the engine core, each worker, and the model-inspection subprocess. It must
therefore be idempotent and cheap: no model code is imported, no device is touched.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from flashmemory_vllm.plugin import compat
from flashmemory_vllm.plugin.names import BACKEND_NAME, CUDA_BACKEND

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def register() -> None:
    """Make `--attention-backend flashmemory` known to this process; whether vLLM fits is tested once it is selected."""
    backend_member()
    compat.wrap_platform_config_check(before=_prepare_config, after=_check_sizes)


def backend_member() -> AttentionBackendEnum:
    """Return vLLM's enum member for this backend, registering it on first use."""
    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, CUDA_BACKEND)
        compat.make_enum_member_picklable(AttentionBackendEnum[BACKEND_NAME], backend_member)
    return AttentionBackendEnum[BACKEND_NAME]


def _prepare_config(vllm_config: "VllmConfig") -> Callable[[], None]:
    from flashmemory_vllm.plugin.checks import prepare_config

    return prepare_config(vllm_config)


def _check_sizes(vllm_config: "VllmConfig") -> None:
    from flashmemory_vllm.plugin.checks import check_sizes

    check_sizes(vllm_config)
