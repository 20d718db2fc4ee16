"""The CUDA backend: vLLM's FlashAttention over compacted tables, block-outermost device layout."""

from typing import Any

import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from flashmemory_vllm.plugin.backends.common import CompactedBuilder, ResidentImpl
from flashmemory_vllm.plugin.names import BACKEND_NAME


class FlashMemoryCudaBuilder(CompactedBuilder, FlashAttentionMetadataBuilder):
    """FlashAttention metadata over compacted tables."""

    # Decode runs in full graphs. With more tokens a row, questions are kept and history is streamed in Python.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    scheduler_metadata: torch.Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's."""
        super().__init__(*args, **kwargs)
        # vLLM sets it only where full graphs read it.
        self._schedules: list[torch.Tensor | None] = [getattr(self, "scheduler_metadata", None)]

    def begin_group(self, group: int) -> None:
        """Give each layer group its own schedule: a captured graph reads it at each replay."""
        while len(self._schedules) <= group:
            first = self._schedules[0]
            self._schedules.append(None if first is None else torch.zeros_like(first))
        self.scheduler_metadata = self._schedules[group]


class FlashMemoryCudaImpl(ResidentImpl, FlashAttentionImpl):
    """FlashAttention over resident blocks."""


class FlashMemoryCudaBackend(FlashAttentionBackend):
    """FlashAttention with KV virtual memory."""

    @staticmethod
    def get_name() -> str:
        """VLLM's name of this backend."""
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """The attention implementation."""
        return FlashMemoryCudaImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """The metadata builder."""
        return FlashMemoryCudaBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Block outermost: all layers of a block are one run of memory, so a block moves in one copy."""
        return (KVCacheLayout.BLNHC,)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """A connector would read device pages by logical block id."""
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Compaction drops earlier blocks, which is only exact for causal attention."""
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        """Its windows are measured in logical positions, which compaction removes."""
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Bidirectional prefixes are not causal."""
        return False
