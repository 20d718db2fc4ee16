"""The CPU backend of latent attention in any dtype: vLLM's reference implementation over compacted tables."""

from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadata, MLACommonMetadataBuilder
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl

from flashmemory_vllm.plugin.backends.latent import LatentBuilder, LatentImpl
from flashmemory_vllm.plugin.names import BACKEND_NAME


class FlashMemoryCpuLatentBuilder(LatentBuilder, MLACommonMetadataBuilder[MLACommonMetadata]):
    """Metadata of latent attention over compacted tables."""


class FlashMemoryCpuLatentImpl(LatentImpl, CPUMLAImpl):
    """Latent attention over resident blocks."""


class FlashMemoryCpuLatentBackend(CPUMLABackend):
    """Stands in for CPU_MLA inside our worker, and for AMX_MLA, which takes bf16 alone, in other dtypes."""

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
