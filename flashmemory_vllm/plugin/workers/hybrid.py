"""The worker's side of a model that has native layers beside managed ones: sizes, and caches in two allocations."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING

import torch
from vllm.v1.core.kv_cache_utils import (
    _max_memory_usage_bytes_from_groups,
    _pool_bytes_per_block,
    get_kv_cache_config_from_groups,
    get_kv_cache_groups,
)
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec, SlidingWindowSpec
from vllm.v1.worker.utils import allocate_kv_cache

from flashmemory_vllm.errors import UnsupportedError
from flashmemory_vllm.plugin.hybrid_admission import HybridSpec
from flashmemory_vllm.plugin.layers import LayerSplit, find_managed
from flashmemory_vllm.plugin.workers.physical import without_block_override
from flashmemory_vllm.runtime.native import NativePool

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def native_bytes(vllm_config: "VllmConfig", specs: Mapping[str, KVCacheSpec], device_bytes: int) -> int:
    """Device memory for the blocks of native layers, as `NativePool.num_bytes` or `--num-gpu-blocks-override` says.

    Args:
        vllm_config: vLLM's configuration.
        specs: what vLLM is told of each layer.
        device_bytes: device memory for KV.

    Raises:
        ConfigError: one request of the longest length does not fit.
        UnsupportedError: vLLM makes no group, or several, of the managed layers.
    """
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise UnsupportedError(
            "--disable-hybrid-kv-cache-manager: set, by an option or by vLLM, for a model with other layers than full "
            "attention; allowed with --attention-backend flashmemory: unset"
        )
    groups = get_kv_cache_groups(vllm_config, dict(specs))
    find_managed(groups, HybridSpec)
    block_bytes = _pool_bytes_per_block(vllm_config, groups)
    override = vllm_config.cache_config.num_gpu_blocks_override
    if override is not None:
        return override * block_bytes
    request_blocks = _max_memory_usage_bytes_from_groups(vllm_config, groups) // block_bytes
    decode_blocks = sum(_steady_blocks(group, vllm_config) for group in groups)
    pool = NativePool(block_bytes, request_blocks, decode_blocks)
    return pool.num_bytes(vllm_config.scheduler_config.max_num_seqs, device_bytes)


def _steady_blocks(group: KVCacheGroupSpec, vllm_config: "VllmConfig") -> int:
    """Blocks that a request holds of a group while it decodes."""
    spec = group.kv_cache_spec
    if isinstance(spec, SlidingWindowSpec):
        tokens = min(spec.sliding_window - 1, vllm_config.model_config.max_model_len)
        return ceil(tokens / spec.block_size) + 1
    return ceil(spec.max_memory_usage_bytes(vllm_config) / spec.page_size_bytes)


def native_config(logical: KVCacheConfig, layers: LayerSplit) -> KVCacheConfig:
    """What vLLM's model runner is to allocate and to know: all groups, memory for native layers alone.

    Args:
        logical: as the engine core resolved it, with the managed layers that it was told of.
        layers: of the model.
    """
    index = find_managed(logical.kv_cache_groups, HybridSpec)
    groups = list(logical.kv_cache_groups)
    groups[index] = replace(groups[index], layer_names=list(layers.managed), kv_cache_spec=_stock_spec(layers))
    tensors = [tensor for tensor in logical.kv_cache_tensors if not set(tensor.layers) & set(layers.managed)]
    return replace(logical, kv_cache_groups=groups, kv_cache_tensors=tensors)


def detach_caches(vllm_config: "VllmConfig", layers: LayerSplit) -> None:
    """Take the managed layers' caches away before vLLM allocates: it zeroes blocks of all layers that have one."""
    for name in layers.managed:
        vllm_config.compilation_config.static_forward_context[name].kv_cache = None


def bind_caches(vllm_config: "VllmConfig", layers: LayerSplit, num_slots: int, device: torch.device) -> None:
    """Allocate S slots [S, ...page] for each managed layer, laid out as vLLM would without others, and bind them.

    Args:
        vllm_config: vLLM's configuration.
        layers: of the model.
        num_slots: S.
        device: the worker's.
    """
    group = KVCacheGroupSpec(list(layers.managed), _stock_spec(layers))
    with without_block_override(vllm_config):
        num_bytes = num_slots * _pool_bytes_per_block(vllm_config, [group])
        config = get_kv_cache_config_from_groups(vllm_config, [group], num_bytes)
    layout = vllm_config.cache_config.get_resolved_kv_cache_layout()
    for name, cache in allocate_kv_cache(config, device, layout, [layers.block_size]).items():
        vllm_config.compilation_config.static_forward_context[name].bind_kv_cache(cache)


@contextmanager
def at_most_blocks(config: KVCacheConfig, num_slots: int) -> Iterator[None]:
    """Let vLLM's own requests, which warm a model up, name no block of any group that S slots do not have.

    They are counted by the blocks of the configuration, those of native layers.

    Args:
        config: the model runner's.
        num_slots: S.
    """
    num_blocks, config.num_blocks = config.num_blocks, min(config.num_blocks, num_slots)
    try:
        yield
    finally:
        config.num_blocks = num_blocks


def _stock_spec(layers: LayerSplit) -> KVCacheSpec:
    specs = list(layers.managed.values())
    return type(specs[0]).merge(specs)
