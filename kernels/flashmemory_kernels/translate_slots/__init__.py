"""From logical slot indices to the device's, for every layer group."""

from flashmemory_kernels.translate_slots.op import translate_slots

__all__ = ["translate_slots"]
