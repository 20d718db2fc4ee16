"""Bytes of a KV cache: every allocation once, whatever lies in it."""

from types import SimpleNamespace

import torch

from flashmemory_vllm.plugin.kv_bytes import KvBytes


def test_an_allocation_that_layers_share_is_counted_once() -> None:
    shared, own = torch.zeros(64, dtype=torch.int8), torch.zeros(8, dtype=torch.float32)
    worker = KvBytes()
    caches = {
        "attention": shared[:32].view(torch.bfloat16),
        "state": [shared[32:48], shared[48:].view(torch.float32)],
        "managed": (own[:4], own[4:]),
        "detached": None,
    }
    layers = {name: SimpleNamespace(kv_cache=cache) for name, cache in caches.items()} | {"other": SimpleNamespace()}
    worker.vllm_config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    assert worker.flashmemory_kv_bytes() == 64 + 32
