"""Reads vLLM's objects and fills the sizes that our own code works with."""

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch
from flashmemory_kernels.partial_attention import partial_attention as naive_partial_attention
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.platforms import current_platform
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.errors import ConfigError, UnsupportedError
from flashmemory_vllm.host_memory import available_host_bytes
from flashmemory_vllm.kinds.base import PageKind, PartialAttention
from flashmemory_vllm.kinds.pages import CpuAmxPages, CpuVectorPages, InterleavedPages, LatentPages, PageFormat
from flashmemory_vllm.plugin.layers import LayerSplit
from flashmemory_vllm.plugin.machine import engines_of_machine
from flashmemory_vllm.plugin.models import LayerSizes, describe_differences, layer_sizes
from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.runtime import capacity
from flashmemory_vllm.runtime.beside import beside_slots
from flashmemory_vllm.runtime.capacity import GIB, CapacityPlan, MemoryBudget, plan_automatic, plan_capacity
from flashmemory_vllm.runtime.shape import AttentionShape

if TYPE_CHECKING:
    from vllm.config import VllmConfig

AnyAttention: TypeAlias = Attention | MLAAttention

# Share of the free host memory that the pool takes when flashmemory.host_memory_gib is not given.
DEFAULT_HOST_SHARE = 0.5


def budget_policy(vllm_config: "VllmConfig", config: FlashMemoryConfig, block_size: int) -> BudgetPolicy:
    """The slot budget of one request, in blocks of so many tokens."""
    return capacity.budget_policy(
        config,
        block_size=block_size,
        max_num_batched_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        max_model_len=vllm_config.model_config.max_model_len,
    )


def plan(
    vllm_config: "VllmConfig",
    config: FlashMemoryConfig,
    split: LayerSplit,
    device_bytes: int,
    device: torch.device,
) -> CapacityPlan:
    """Size slots and logical blocks from what vLLM measured and what the host offers.

    Args:
        vllm_config: vLLM's configuration.
        config: our options.
        split: the model's layers.
        device_bytes: device memory that stock vLLM would give to its KV cache, without that of native layers.
        device: the worker's device.

    Raises:
        ConfigError: the sizes asked for do not fit.
    """
    shape = attention_shape(attention_layers(vllm_config, list(split.managed)), split, device)
    return _plan(vllm_config, config, shape, budget_policy(vllm_config, config, split.block_size), device_bytes)


def check_capacity(vllm_config: "VllmConfig", config: FlashMemoryConfig) -> None:
    """Refuse sizes that cannot hold one request, as far as the options tell before a model is loaded.

    Raises:
        ConfigError: the sizes asked for do not fit.
    """
    _host_bytes(config, 1)  # what is asked for all engines must be there before the first one takes its share
    device_bytes = vllm_config.cache_config.kv_cache_memory_bytes
    shape = _announced_shape(vllm_config)
    # What the worker has not measured yet limits nothing; `plan` has it
    budget = budget_policy(vllm_config, config, shape.block_size)
    _plan(vllm_config, config, shape, budget, device_bytes or sys.maxsize)


def _plan(
    vllm_config: "VllmConfig",
    config: FlashMemoryConfig,
    shape: AttentionShape,
    budget: BudgetPolicy,
    device_bytes: int,
) -> CapacityPlan:
    host_bytes = _host_bytes(config, engines_of_machine(vllm_config)) // vllm_config.parallel_config.local_world_size
    if shape.device.type == "cpu" and vllm_config.cache_config.kv_cache_memory_bytes is None:
        # Device and host are the same memory here: the stock share is split so that slots hold the ratio of the pool.
        device_bytes = int(device_bytes * config.resident_ratio / (1 + config.resident_ratio))
        host_bytes = min(host_bytes, int(device_bytes / config.resident_ratio))
    # vLLM keeps what was asked for: -1 is "auto"
    is_automatic = vllm_config.model_config.original_max_model_len == -1
    max_num_seqs, device_option = vllm_config.scheduler_config.max_num_seqs, _device_option(vllm_config)
    return (plan_automatic if is_automatic else plan_capacity)(
        MemoryBudget(device_bytes, host_bytes, config.device_slots, max_num_seqs, device_option),
        budget,
        shape.block_bytes,
        beside_slots(config, shape, budget, max_num_seqs, device_bytes),
    )


def _device_option(vllm_config: "VllmConfig") -> str:
    """What says how much device memory there is for KV."""
    if vllm_config.cache_config.kv_cache_memory_bytes is None:
        return "--gpu-memory-utilization"
    # vLLM's CPU platform makes the option of it
    space = "VLLM_CPU_KVCACHE_SPACE"
    return space if current_platform.is_cpu() and os.environ.get(space) else "--kv-cache-memory-bytes"


def _host_bytes(config: FlashMemoryConfig, num_engines: int) -> int:
    """The host pools of one engine's ranks together, of so many engines that start on this machine one by one."""
    available = available_host_bytes()
    if config.host_memory_gib is None:
        return int(available.bytes * DEFAULT_HOST_SHARE) // num_engines
    asked = int(config.host_memory_gib * GIB) // num_engines
    if asked > available.bytes:
        share = f", of which {asked / GIB:.2f} for this engine" if num_engines > 1 else ""
        raise ConfigError(
            f"flashmemory.host_memory_gib: {config.host_memory_gib} given{share}, allowed: at most "
            f"{available.bytes / GIB:.2f} (limited by {available.limited_by})"
        )
    return asked


def attention_layers(vllm_config: "VllmConfig", names: list[str]) -> dict[str, AnyAttention]:
    """The attention layers in depth order (the order in which the model created them)."""
    layers: dict[str, AnyAttention] = get_layers_from_vllm_config(vllm_config, Attention, names)
    return layers or get_layers_from_vllm_config(vllm_config, MLAAttention, names)


def attention_shape(layers: Mapping[str, AnyAttention], split: LayerSplit, device: torch.device) -> AttentionShape:
    """Sizes shared by all managed layers.

    Args:
        layers: the managed layers in depth order.
        split: the model's layers.
        device: the worker's device.

    Raises:
        UnsupportedError: they differ. vLLM puts layers of several sizes into one KV cache group if all else is equal.
    """
    sizes = {
        index: LayerSizes(layer.num_heads, layer.num_kv_heads, layer.head_size)
        for index, layer in enumerate(layers.values())
    }
    if differences := describe_differences(sizes):
        raise UnsupportedError(
            f"model: {differences}; allowed with --attention-backend flashmemory: the same in every attention layer"
        )
    first, spec = next(iter(layers.values())), next(iter(split.managed.values()))
    return AttentionShape(
        layer_names=tuple(layers),
        num_query_heads=first.num_heads,
        num_kv_heads=first.num_kv_heads,
        head_dim=first.head_size,
        softmax_scale=float(first.impl.scale),
        block_size=split.block_size,
        dtype=spec.dtype,
        device=device,
        page_dim=first.head_size if isinstance(first, MLAAttention) else None,
    )


def max_num_tokens(vllm_config: "VllmConfig") -> int:
    """Most tokens of a batch, the padding of captured graphs included."""
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(vllm_config.scheduler_config.max_num_batched_tokens, captured)


def _announced_shape(vllm_config: "VllmConfig") -> AttentionShape:
    """The sizes that the model's configuration announces, before there are layers."""
    model = vllm_config.model_config
    layers = layer_sizes(model, vllm_config.parallel_config)
    first = next(iter(layers.values()))
    return AttentionShape(
        layer_names=tuple(map(str, layers)),
        num_query_heads=first.num_query_heads,
        num_kv_heads=first.num_kv_heads,
        head_dim=first.head_dim,
        softmax_scale=1.0,
        block_size=vllm_config.cache_config.block_size,
        dtype=kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, model),
        device=torch.device(current_platform.device_type),
        page_dim=first.head_dim if model.use_mla else None,
    )


def page_kind(layers: Mapping[str, AnyAttention], shape: AttentionShape) -> PageKind:
    """What the pages of the managed layers mean."""
    found = {index: getattr(layer.impl, "sinks", None) for index, layer in enumerate(layers.values())}
    sinks = {index: sink for index, sink in found.items() if sink is not None}
    return PageKind(_page_format(layers, shape), shape.softmax_scale, _partial_attention(shape.device), sinks)


def _page_format(layers: Mapping[str, AnyAttention], shape: AttentionShape) -> PageFormat:
    """How the platform's kernel lays out keys and values inside a page."""
    sizes = (shape.num_kv_heads, shape.block_size, shape.head_dim)
    first = next(iter(layers.values()))
    if isinstance(first, MLAAttention):
        return LatentPages(*sizes, first.kv_lora_rank)
    if shape.device.type == "cuda":
        return InterleavedPages(*sizes)
    isa = getattr(first, "isa", "vec")
    if isa not in {"vec", "vec16", "amx"}:
        raise ConfigError(f"cpu: vLLM chose the attention kernel {isa}; allowed: vec, vec16, amx (x86)")
    return CpuAmxPages(*sizes) if isa == "amx" else CpuVectorPages(*sizes)


def _partial_attention(device: torch.device) -> PartialAttention:
    """Attention over a part of the keys that also returns its log-sum-exp."""
    if device.type == "cuda":
        from flashmemory_vllm.plugin.backends.flash_partial import flash_partial_attention

        return flash_partial_attention
    return naive_partial_attention
