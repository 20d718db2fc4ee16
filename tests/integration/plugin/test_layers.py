"""Models of several kinds of layers: which are ours, and that vLLM groups the others as it would without us."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.core.kv_cache_utils import (
    _max_memory_usage_bytes_from_groups,
    _pool_bytes_per_block,
    get_kv_cache_groups,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from flashmemory_vllm.cli.plan import model_sizes
from flashmemory_vllm.errors import ConfigError, UnsupportedError
from flashmemory_vllm.plugin.admission import FlashMemorySpec
from flashmemory_vllm.plugin.hybrid_admission import HybridSpec
from flashmemory_vllm.plugin.layers import find_managed, split_layers
from flashmemory_vllm.plugin.workers import hybrid
from flashmemory_vllm.residency.budget import BudgetPolicy
from flashmemory_vllm.runtime.native import native_pool
from tests.helpers.published import published_fields

BF16 = torch.bfloat16
BLOCK = 16
POLICY = BudgetPolicy(BLOCK, 0.135, 2048, 16, 64, 4096, 131072, 0)
LAYOUTS = [KVCacheLayout.LBHNC, KVCacheLayout.BLNHC]
LATENT = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=BF16)
CONVOLUTION = MambaSpec(block_size=16, shapes=((64,),), dtypes=(BF16,), mamba_type=MambaAttentionBackendEnum.SHORT_CONV)
CHUNKED = ChunkedLocalAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=BF16, attention_chunk_size=64)


def full(heads: int, dim: int, block: int = 16) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=block, num_kv_heads=heads, head_size=dim, dtype=BF16)


def window(heads: int, dim: int, tokens: int, block: int = 16) -> SlidingWindowSpec:
    return SlidingWindowSpec(block_size=block, num_kv_heads=heads, head_size=dim, dtype=BF16, sliding_window=tokens)


def every(number: int, count: int, ours: FullAttentionSpec, native: KVCacheSpec) -> list[KVCacheSpec]:
    """So many layers, of which each `number`th attends to all tokens."""
    return [native if (layer + 1) % number else ours for layer in range(count)]


def states(number: int, count: int, heads: int, dim: int, shapes: tuple[tuple[int, ...], ...]) -> list[KVCacheSpec]:
    """As `every`, with states beside. vLLM makes a block of attention as large as a state, and pads that to it."""
    state = MambaSpec(block_size=1, shapes=shapes, dtypes=(BF16, torch.float32), mamba_cache_mode="align")
    token = full(heads, dim, 1).page_size_bytes
    block = BLOCK * ceil(state.page_size_bytes / (BLOCK * token))
    return every(
        number, count, full(heads, dim, block), replace(state, block_size=block, page_size_padded=block * token)
    )


def delta(value_heads: int, key_heads: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of a gated delta net's state, with heads of 128."""
    return (3, 128 * (2 * key_heads + value_heads)), (value_heads, 128, 128)


# Layers of models as they are published
MODELS = {
    "gpt-oss-120b": every(2, 36, full(8, 64), window(8, 64, 128)),
    "gpt-oss-20b": every(2, 24, full(8, 64), window(8, 64, 128)),
    "Gemma3-27B": every(6, 62, full(16, 128), window(16, 128, 1024)),
    # More bytes of a token in windows than in full attention
    "Gemma4-31B": every(6, 60, full(4, 512), window(16, 256, 1024)),
    "Step-3.5-Flash": [window(8, 128, 512) if layer % 4 else full(8, 128) for layer in range(45)],
    "Qwen3.5-27B": states(4, 64, 4, 256, delta(48, 16)),
    "Qwen3.5-397B": states(4, 60, 2, 256, delta(64, 16)),
    "Qwen3-Next-80B": states(4, 48, 2, 256, delta(32, 16)),
    "Nemotron-3-Nano": states(5, 30, 2, 128, ((3, 64 * 64 + 2 * 8 * 128), (64, 64, 128)))[1:],
    # As nobody publishes them: more layers of ours than of others
    "few windows": every(4, 24, full(8, 64), window(8, 64, 128))[::-1] + [full(8, 64)] * 20,
    "one of ours": every(6, 6, full(2, 32), window(2, 32, 64)),
}


def named(layers: list[KVCacheSpec]) -> dict[str, KVCacheSpec]:
    return {f"model.layers.{layer}": spec for layer, spec in enumerate(layers)}


def config(layout: KVCacheLayout = LAYOUTS[0], in_flight: int = 4096, **cache: Any) -> Any:
    """What vLLM's grouping reads of an engine's configuration."""
    options = {
        "mamba_cache_mode": "align",
        "prefix_cache_retention_interval": None,
        "num_gpu_blocks_override": None,
        "block_size": 16,
        "prefix_match_unit": None,
        "enable_prefix_caching": True,
    }
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False, max_num_seqs=4),
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: layout, **options | cache),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        kv_transfer_config=None,
        model_config=SimpleNamespace(max_model_len=131072, hf_config=SimpleNamespace(model_type="any")),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, tensor_parallel_size=1
        ),
        max_in_flight_tokens=in_flight,
    )


def announced(specs: Mapping[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
    """What our worker tells vLLM of the layers."""
    split = split_layers(specs, BLOCK)
    ours = {
        name: HybridSpec.among(split.native_page_bytes, spec, POLICY, Path("counters"), 1)
        for name, spec in split.announced.items()
    }
    return {**ours, **split.native}


def groups_of(specs: Mapping[str, KVCacheSpec], layout: KVCacheLayout) -> list[KVCacheGroupSpec]:
    made: list[KVCacheGroupSpec] = get_kv_cache_groups(config(layout), dict(specs))
    return made


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("model", MODELS)
def test_native_layers_are_in_no_more_groups_than_without_us_and_ours_in_one(model: str, layout: KVCacheLayout) -> None:
    specs = named(MODELS[model])
    split = split_layers(specs, BLOCK)
    made = groups_of(announced(specs), layout)
    ours = made.pop(find_managed(made, HybridSpec))
    assert set(ours.layer_names) <= set(split.managed)
    found = [set(group.layer_names) for group in made]
    assert set().union(*found) == set(split.native)
    of_stock = [group for group in groups_of(specs, layout) if set(group.layer_names) <= set(split.native)]
    assert len(found) <= len(of_stock)
    # A request takes no more of the device for them
    vllm_config = config(layout)
    stock_bytes = _max_memory_usage_bytes_from_groups(vllm_config, of_stock)
    assert _max_memory_usage_bytes_from_groups(vllm_config, [*made, ours]) <= stock_bytes


@pytest.mark.parametrize("model", MODELS)
def test_a_hit_ends_where_a_managed_block_does(model: str) -> None:
    groups = groups_of(announced(named(MODELS[model])), LAYOUTS[0])
    _, hash_block = resolve_kv_cache_block_sizes(KVCacheConfig(1, [], groups), config())
    assert hash_block == 16


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([window(2, 32, 64)], r"layer model\.layers\.0 has KV cache spec SlidingWindowSpec.*; allowed: causal full"),
        ([full(2, 32), LATENT], r"layers\.1 has .*MLA"),
        ([full(2, 32), replace(full(2, 32), non_causal=True)], r"layers\.1 has .*non_causal=True"),
        ([full(2, 32), replace(full(2, 32), sliding_window=64)], r"layers\.1 has .*sliding_window=64"),
        ([full(2, 32), CONVOLUTION], r"layers\.1 has a state of kind SHORT_CONV; allowed: MAMBA2, GDN_ATTN"),
        ([full(2, 32), CHUNKED], r"layers\.1 has .*ChunkedLocal"),
        (
            [full(2, 32, 32), window(2, 32, 64, 16), window(2, 32, 64, 48)],
            r"^--block-size: .* of 32 tokens, which do not divide those of the other layers, 16; allowed .* of 16$",
        ),
    ],
    ids=["no layer of ours", "latent", "not causal", "a window as full attention", "convolution", "chunks", "blocks"],
)
def test_layers_that_are_neither(layers: list[KVCacheSpec], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        split_layers(named(layers), BLOCK)


def test_a_grouping_that_splits_ours_or_mixes_it_is_refused() -> None:
    native = KVCacheGroupSpec(["n"], window(2, 32, 64))
    ours = KVCacheGroupSpec(["a"], HybridSpec.among(64, full(2, 32), POLICY, Path("counters"), 1))
    assert find_managed([native, ours], HybridSpec) == 1
    for wrong in ([native], [ours, native, ours]):
        with pytest.raises(UnsupportedError, match=r"makes the KV cache groups 1 layers of .*; allowed: one with all"):
            find_managed(wrong, HybridSpec)


def test_specs_of_ours_do_not_merge_with_others() -> None:
    ours = HybridSpec.among(64, full(2, 32), POLICY, Path("counters"), 1)
    assert HybridSpec.merge([ours, ours]) == ours
    with pytest.raises(AssertionError):
        HybridSpec.merge([ours, FlashMemorySpec.from_spec(full(2, 32), POLICY, Path("counters"))])


def test_native_layers_have_room_for_all_requests_and_for_prefixes_that_these_leave_room_for() -> None:
    specs, vllm_config = announced(named(MODELS["gpt-oss-20b"])), config()
    groups = get_kv_cache_groups(vllm_config, dict(specs))
    block = _pool_bytes_per_block(vllm_config, groups)
    one = _max_memory_usage_bytes_from_groups(vllm_config, groups)
    # A window of 128 tokens is in nine blocks of 16, at most
    running = one + block + 3 * 9 * block
    total = 100 * running
    assert hybrid.native_bytes(vllm_config, specs, total) == running + 8 * 4 * 9 * block
    # Where memory is short at most half of it is for those that run, but never less than one request needs
    short = one + block + running
    half = short // 2
    assert one + block < half < running
    assert hybrid.native_bytes(vllm_config, specs, short) == half + int((short - half) * 0.2)
    least = one + block
    assert hybrid.native_bytes(vllm_config, specs, least + 100) == least + 20
    with pytest.raises(ConfigError, match=r"--kv-cache-memory-bytes: \d+ bytes .* need \d+ for one request"):
        hybrid.native_bytes(vllm_config, specs, one)
    assert hybrid.native_bytes(config(num_gpu_blocks_override=7), specs, total) == 7 * block


def test_one_block_manager_for_all_layers_is_refused() -> None:
    vllm_config = config()
    vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = True
    with pytest.raises(UnsupportedError, match="--disable-hybrid-kv-cache-manager: set, by an option or by vLLM"):
        hybrid.native_bytes(vllm_config, announced(named(MODELS["gpt-oss-20b"])), 1 << 40)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_caches_of_ours_are_an_allocation_of_their_own(layout: KVCacheLayout) -> None:
    split = split_layers(named(MODELS["one of ours"]), BLOCK)
    bound: dict[str, torch.Tensor] = {}
    modules = {
        name: SimpleNamespace(kv_cache="vllm's", bind_kv_cache=lambda cache, name=name: bound.update({name: cache}))
        for name in named(MODELS["one of ours"])
    }
    vllm_config = config(layout)
    vllm_config.compilation_config = SimpleNamespace(static_forward_context=modules)
    hybrid.detach_caches(vllm_config, split)
    assert [module.kv_cache for module in modules.values()] == ["vllm's"] * 5 + [None]
    hybrid.bind_caches(vllm_config, split, 7, torch.device("cpu"))
    assert {name: cache.shape for name, cache in bound.items()} == {"model.layers.5": (7, 2, 16, 64)}


def test_vllm_is_given_all_groups_and_memory_for_native_layers_alone() -> None:
    specs = named(MODELS["few windows"])
    split, groups = split_layers(specs, BLOCK), groups_of(announced(specs), LAYOUTS[0])
    index = find_managed(groups, HybridSpec)
    tensors: list[Any] = [SimpleNamespace(layers=group.layer_names) for group in groups]
    made = hybrid.native_config(KVCacheConfig(9, tensors, groups), split)
    assert made.kv_cache_groups[index].layer_names == list(split.managed)
    assert type(made.kv_cache_groups[index].kv_cache_spec) is FullAttentionSpec
    assert made.kv_cache_tensors == tensors[:index] + tensors[index + 1 :]
    assert len(groups[index].layer_names) < len(split.managed), "what the engine core resolved is left as it is"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize(
    ("planned", "served"),
    [
        ("gpt-oss-20b", "gpt-oss-20b"),
        ("gpt-oss-120b", "gpt-oss-120b"),
        ("gemma-3-27b", "Gemma3-27B"),
        ("nemotron-3-nano", "Nemotron-3-Nano"),
        ("qwen3-next-80b", "Qwen3-Next-80B"),
    ],
)
def test_a_plan_has_the_blocks_that_a_server_has(planned: str, served: str, layout: KVCacheLayout) -> None:
    """Without vLLM, from a model's configuration: `flashmemory plan`."""
    layers = [
        replace(spec, num_prefill_checkpoint_blocks=int("nemotron" in planned)) if isinstance(spec, MambaSpec) else spec
        for spec in MODELS[served]
    ]
    # As the states of the table
    model = model_sizes(published_fields(planned) | {"mamba_ssm_dtype": "float32"}, "auto")
    pool = native_pool(model.native_kinds(BLOCK, 1), model.num_layers, 4096, 131072)
    specs, vllm_config = announced(named(layers)), config(layout)
    groups = get_kv_cache_groups(vllm_config, dict(specs))
    assert pool.block_bytes == _pool_bytes_per_block(vllm_config, groups)
    assert pool.request_blocks * pool.block_bytes == _max_memory_usage_bytes_from_groups(vllm_config, groups)
    for total in (2 * (pool.request_blocks + 1) * pool.block_bytes, 1 << 36):
        assert pool.num_bytes(4, total) == hybrid.native_bytes(vllm_config, specs, total)
