"""VLLM's KV cache configuration again, for the S slots of the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import _pool_bytes_per_block, get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import KVCacheConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def physical_config(vllm_config: "VllmConfig", logical: KVCacheConfig, num_slots: int) -> KVCacheConfig:
    """VLLM's KV cache configuration for S slots, everything else as the engine core resolved it.

    Args:
        vllm_config: vLLM's configuration.
        logical: for N logical blocks.
        num_slots: S.
    """
    groups = logical.kv_cache_groups
    with without_block_override(vllm_config):
        device_bytes = num_slots * _pool_bytes_per_block(vllm_config, groups)
        physical = get_kv_cache_config_from_groups(vllm_config, groups, device_bytes)
    assert physical.num_blocks == num_slots
    return replace(logical, num_blocks=num_slots, kv_cache_tensors=physical.kv_cache_tensors)


@contextmanager
def without_block_override(vllm_config: "VllmConfig") -> Iterator[None]:
    """`--num-gpu-blocks-override` counts logical blocks; it must not size the device tensor."""
    cache_config = vllm_config.cache_config
    override, cache_config.num_gpu_blocks_override = cache_config.num_gpu_blocks_override, None
    try:
        yield
    finally:
        cache_config.num_gpu_blocks_override = override
