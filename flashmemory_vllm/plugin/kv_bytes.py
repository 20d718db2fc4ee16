"""What a worker of vLLM's, any worker, has allocated for its KV cache."""

from collections.abc import Iterator
from typing import Any

import torch


class KvBytes:
    """An extension of vLLM's workers (`worker_extension_cls`)."""

    vllm_config: Any

    def flashmemory_kv_bytes(self) -> int:
        """Device bytes behind the pages and states of all layers, each allocation counted once."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        storages = [
            tensor.untyped_storage() for layer in layers for tensor in _tensors(getattr(layer, "kv_cache", None))
        ]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(cache: object) -> Iterator[torch.Tensor]:
    """Of a layer's cache: vLLM has a tensor there, or several for a state, or nothing."""
    if isinstance(cache, torch.Tensor):
        yield cache
    elif isinstance(cache, (tuple, list)):
        for part in cache:
            yield from _tensors(part)
