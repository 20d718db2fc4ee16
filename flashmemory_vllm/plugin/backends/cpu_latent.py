"""The CPU backend of latent attention: vLLM's reference implementation over compacted tables.

On a CPU with AMX vLLM has a faster one, whose prefill is one fused kernel that cannot leave history to be streamed.
"""

from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadata, MLACommonMetadataBuilder
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl

from flashmemory_vllm.plugin.backends.latent import LatentBuilder, LatentImpl
from flashmemory_vllm.plugin.names import BACKEND_NAME


class FlashMemoryCpuLatentBuilder(LatentBuilder, MLACommonMetadataBuilder[MLACommonMetadata]):
    """Metadata of latent attention over compacted tables."""


class FlashMemoryCpuLatentImpl(LatentImpl, CPUMLAImpl):
    """Latent attention over resident blocks."""


class FlashMemoryCpuLatentBackend(CPUMLABackend):
    """Stands in for CPU_MLA and AMX_MLA inside our worker."""

    @staticmethod
    def get_name() -> str:
        """VLLM's name of this backend."""
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[CPUMLAImpl]:
        """The attention implementation."""
        return FlashMemoryCpuLatentImpl

    @staticmethod
    def get_builder_cls() -> type[MLACommonMetadataBuilder[MLACommonMetadata]]:
        """The metadata builder."""
        return FlashMemoryCpuLatentBuilder
