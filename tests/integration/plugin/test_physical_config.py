"""The KV cache that a worker allocates: S pages where the engine core has resolved N blocks, all else as resolved."""

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.kv_cache_interface import KVCacheConfig

from flashmemory_vllm.plugin.workers import physical


def test_all_but_the_size_is_as_the_engine_core_resolved_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors: list[Any] = ["S pages"]
    of_slots = KVCacheConfig(num_blocks=7, kv_cache_tensors=tensors, kv_cache_groups=[])
    monkeypatch.setattr(physical, "_pool_bytes_per_block", lambda *_: 1)
    monkeypatch.setattr(physical, "get_kv_cache_config_from_groups", lambda *_: of_slots)
    resolved: dict[str, Any] = {field.name: f"resolved {field.name}" for field in fields(KVCacheConfig)}
    vllm_config: Any = SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks_override=None))
    made = physical.physical_config(vllm_config, KVCacheConfig(**resolved), 7)
    assert vars(made) == resolved | {"num_blocks": 7, "kv_cache_tensors": tensors}
