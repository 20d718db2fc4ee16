"""The CPU backend of latent attention on AMX tiles, in bf16: vLLM's own over compacted tables."""

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.mla.amx_mla import AMXMLABackend, AMXMLAImpl, AMXMLAMetadataBuilder

from flashmemory_vllm.plugin.backends.latent import LatentBuilder, LatentImpl
from flashmemory_vllm.plugin.names import BACKEND_NAME


class FlashMemoryAmxLatentBuilder(LatentBuilder, AMXMLAMetadataBuilder):
    """Metadata of latent attention over compacted tables."""


class FlashMemoryAmxLatentImpl(LatentImpl, AMXMLAImpl):
    """Latent attention over resident blocks.

    Prefill is one kernel over all that a row's table names. Of a streamed row that is not all; its output is replaced.
    """

    def by_head(self, vectors: torch.Tensor, *, is_key: bool) -> torch.Tensor:
        """By vLLM's packed weights, the only ones that it keeps here."""
        packed = self._w_uk_packed if is_key else self._w_uv_packed
        width = self.kv_lora_rank if is_key else self.v_head_dim
        product = vectors.new_empty(*vectors.shape[:2], width)
        ops.bmm_cpu(product.transpose(0, 1), vectors.transpose(0, 1), packed, True, self._w_scale)
        return product


class FlashMemoryAmxLatentBackend(AMXMLABackend):
    """Stands in for AMX_MLA inside our worker."""

    @staticmethod
    def get_name() -> str:
        """VLLM's name of this backend."""
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[AMXMLAImpl]:
        """The attention implementation."""
        return FlashMemoryAmxLatentImpl

    @staticmethod
    def get_builder_cls() -> type[AMXMLAMetadataBuilder]:
        """The metadata builder."""
        return FlashMemoryAmxLatentBuilder
