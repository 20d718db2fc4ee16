"""The CPU backend: vLLM's CPU attention over compacted tables."""

from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from flashmemory_vllm.plugin.backends.common import CompactedBuilder, ResidentImpl
from flashmemory_vllm.plugin.names import BACKEND_NAME


class FlashMemoryCpuBuilder(CompactedBuilder, CPUAttentionMetadataBuilder):
    """CPU attention metadata over compacted tables."""


class FlashMemoryCpuImpl(ResidentImpl, CPUAttentionBackendImpl):
    """CPU attention over resident blocks."""


class FlashMemoryCpuBackend(CPUAttentionBackend):
    """Stands in for CPU_ATTN inside our worker."""

    @staticmethod
    def get_name() -> str:
        """VLLM's name of this backend."""
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The attention implementation."""
        return FlashMemoryCpuImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """The metadata builder."""
        return FlashMemoryCpuBuilder
