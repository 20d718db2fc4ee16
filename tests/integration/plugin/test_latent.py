"""Models with latent attention: which are served, with which options of vLLM, and what is said of the others."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from flashmemory_vllm.cli.plan import model_sizes, read_model_fields
from flashmemory_vllm.plugin import sizing
from flashmemory_vllm.plugin.admission import FlashMemorySpec
from flashmemory_vllm.plugin.latent import runs_on_amx, unserved_latents
from flashmemory_vllm.plugin.layers import split_layers
from flashmemory_vllm.plugin.names import CAPTURE_EXTENSION
from flashmemory_vllm.plugin.seams import check_seams
from flashmemory_vllm.residency.budget import BudgetPolicy
from tests.helpers.indexers import save_untrained
from tests.integration.configurations import configure, refusal

Save = Callable[[Mapping[str, Any]], Path]

LATENTS = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 64,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
}
SPEC = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
POLICY = BudgetPolicy(
    block_size=16,
    resident_ratio=0.135,
    min_sparse_tokens=0,
    sink_tokens=16,
    recent_tokens=32,
    max_num_batched_tokens=256,
    max_model_len=1024,
    growth_reserve_tokens=0,
)

pytestmark = pytest.mark.usefixtures("plugin_here")


@pytest.fixture
def model(save_model: Save) -> Path:
    """A folder with a configuration."""
    return save_model(LATENTS)


def test_chunks_and_prefixes_stay_as_asked_for(model: Path) -> None:
    """A CPU's platform would switch both off, and choose its own block size."""
    config = configure(model, block_size=None, max_num_batched_tokens=1024)
    assert config.cache_config.block_size == 16
    assert config.scheduler_config.enable_chunked_prefill
    assert config.scheduler_config.max_num_batched_tokens == 1024
    assert config.cache_config.enable_prefix_caching
    assert not configure(model, block_size=None, enable_prefix_caching=False).cache_config.enable_prefix_caching


def test_a_plan_has_the_sizes_that_a_server_announces(model: Path) -> None:
    announced = sizing._announced_shape(configure(model, block_size=None))
    planned = model_sizes(read_model_fields(str(model)), "float32").shape(16)
    assert planned == announced
    assert planned.block_bytes == 2 * 16 * 576 * 4


def test_a_seam_that_moved_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not concern other models."""

    def forward_mqa(self: object, q: object) -> None:
        """Of another shape."""

    monkeypatch.setattr(CPUMLAImpl, "forward_mqa", forward_mqa)
    message = str(refusal(model, block_size=None))
    assert message.startswith("vllm: this build differs from 0.32 where flashmemory hooks in: ")
    assert "CPUMLAImpl.forward_mqa has parameters ['self', 'q'], expected" in message
    check_seams()


def test_one_size_of_blocks(model: Path) -> None:
    assert str(refusal(model, block_size=32)) == "--block-size is 32: allowed on a CPU with latent attention is 16"


@pytest.mark.parametrize("has_tiles", [True, False])
def test_tiles_take_bf16_alone_and_larger_blocks(model: Path, monkeypatch: pytest.MonkeyPatch, has_tiles: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_tiles)
    config = configure(model, block_size=None, dtype="bfloat16")
    assert config.cache_config.block_size == (32 if has_tiles else 16)
    assert runs_on_amx(config.model_config) == has_tiles
    assert not runs_on_amx(configure(model, block_size=None).model_config)
    if has_tiles:
        message = str(refusal(model, block_size=48, dtype="bfloat16"))
        assert message == "--block-size is 48: allowed on a CPU with latent attention are multiples of 32"


@pytest.mark.parametrize(
    ("changes", "reason", "allowed"),
    [
        (
            {"kv_lora_rank": 32},
            "multi-head latent attention with keys of 96 elements, 32 of them the latent",
            "on a CPU 576 elements, 512 of them the latent",
        ),
        (
            {"index_topk": 64, "index_n_heads": 4, "index_head_dim": 64},
            "multi-head latent attention of a deepseek_v3",
            "that of deepseek_v2, deepseek_v3, kimi_k2, without an indexer of its own",
        ),
    ],
    ids=["sizes", "an indexer of its own"],
)
def test_other_latents(save_model: Save, changes: dict[str, Any], reason: str, allowed: str) -> None:
    model = save_model(LATENTS | changes)
    assert str(refusal(model, block_size=None)) == (
        f"model: {model} ({reason}) is not supported with --attention-backend flashmemory; allowed: {allowed}"
    )


def test_a_gpu_and_other_families() -> None:
    config: Any = SimpleNamespace(use_mla=True, hf_text_config=SimpleNamespace(model_type="longcat_flash"))
    found = unserved_latents(config, is_cpu=False)
    assert found == ("multi-head latent attention on a GPU", "latent attention on a CPU, or plain full attention")
    found = unserved_latents(config, is_cpu=True)
    assert found is not None
    assert found[0] == "multi-head latent attention of a longcat_flash"
    config.use_mla = False
    assert unserved_latents(config, is_cpu=True) is None


@pytest.mark.parametrize(
    ("engine", "given", "allowed"),
    [
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size: 2 with latent attention", "1"),
        (
            {"worker_extension_cls": CAPTURE_EXTENSION},
            "model: {model} (latent attention, to be recorded)",
            "plain full attention",
        ),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype: fp8", "auto, which is float32, the model's dtype"),
    ],
    ids=["ranks", "recorded", "quantised"],
)
def test_options(model: Path, engine: dict[str, Any], given: str, allowed: str) -> None:
    assert str(refusal(model, block_size=None, **engine)) == (
        f"{given.format(model=model)} is not supported with --attention-backend flashmemory; allowed: {allowed}"
    )


def test_an_indexer(model: Path, tmp_path: Path) -> None:
    indexer = save_untrained(tmp_path / "indexer")
    message = str(refusal(model, {"indexer": str(indexer), "selector": "neural"}, block_size=None))
    assert message.startswith(f"flashmemory.indexer: {indexer} with latent attention is not supported")
    assert message.endswith("allowed: unset: no indexer was trained for latents")


def test_the_spec_has_the_bytes_of_latents_and_no_values() -> None:
    spec = FlashMemorySpec.from_spec(SPEC, POLICY, Path("counters"))
    assert spec.page_size_bytes == SPEC.page_size_bytes == 16 * 576 * 2
    assert FlashMemorySpec.merge([spec, spec]) == spec


def test_layers_of_latents_are_ours() -> None:
    split = split_layers({"0": SPEC, "1": SPEC}, 16)
    assert list(split.managed) == ["0", "1"]
    assert not split.native
