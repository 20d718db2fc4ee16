"""What vLLM makes of options and checkpoints: served, or refused by the name of what the user gave."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from vllm.config import ParallelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.kv_cache_interface import FullAttentionSpec

from flashmemory_vllm.errors import UnsupportedError
from flashmemory_vllm.plugin import checks, sizing
from flashmemory_vllm.plugin.admission import FlashMemorySpec
from flashmemory_vllm.plugin.checks import read_config
from flashmemory_vllm.plugin.layers import LayerSplit
from flashmemory_vllm.plugin.models import LayerSizes, describe_differences, layer_sizes, managed_layers
from tests.integration.configurations import LLAMA, configure, refusal

pytestmark = pytest.mark.usefixtures("plugin_here")

SaveModel = Callable[[Mapping[str, Any]], Path]
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 16,
}
BACKEND = "is not supported with --attention-backend flashmemory; allowed: "
FP8_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
W8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
A8 = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": W8, "input_activations": A8, "targets": ["Linear"]}},
    "kv_cache_scheme": FP8_SCHEME,
}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": FP8_SCHEME}
# Its configuration comes with its weights, as code
DECI_CODE = """
from transformers import LlamaConfig
from types import SimpleNamespace

class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, plain_block_configs=(), **rest):
        super().__init__(**rest)
        self.plain_block_configs = plain_block_configs

    @property
    def block_configs(self):
        return [SimpleNamespace(**{key: SimpleNamespace(**part) for key, part in block.items()})
                for block in self.plain_block_configs]
"""


@pytest.fixture
def save_deci(save_model: SaveModel) -> Callable[[Sequence[int | None]], Path]:
    """A DeciLM whose layers have so many KV heads, or no attention."""

    def save(kv_heads: Sequence[int | None]) -> Path:
        blocks = [
            {
                "attention": {"no_op": heads is None, "n_heads_in_group": None if heads is None else 4 // heads},
                "ffn": {"no_op": False, "intermediate_size": 128},
            }
            for heads in kv_heads
        ]
        folder = save_model(
            {
                "architectures": ["DeciLMForCausalLM"],
                "model_type": "nemotron-nas",
                "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
                "num_hidden_layers": len(kv_heads),
                "num_key_value_heads": None,
                "plain_block_configs": blocks,
            }
        )
        (folder / "configuration_decilm.py").write_text(DECI_CODE)
        return folder

    return save


def test_layers_without_attention_need_no_memory(save_deci: Callable[[Sequence[int | None]], Path]) -> None:
    model = save_deci([2, None, 2, None, None, None, 2, 2])
    options = {"host_memory_gib": 257 * 4 * 8192 / 2**30}
    config = configure(model, options, trust_remote_code=True)
    assert list(layer_sizes(config.model_config, config.parallel_config)) == [0, 2, 6, 7]
    with_less = str(refusal(model, {"host_memory_gib": 256 * 4 * 8192 / 2**30}, trust_remote_code=True))
    assert "blocks of 32768 bytes, but one request of --max-model-len 8192 needs 257" in with_less


def test_layers_with_different_heads_are_named(save_deci: Callable[[Sequence[int | None]], Path]) -> None:
    model = save_deci([2, 4, 2, None, 2, 1])
    assert str(refusal(model, trust_remote_code=True)) == (
        f"model: {model} (4 query heads, 2 KV heads, head size 16 in layers 0, 2, 4; 4 query heads, 4 KV heads, head "
        "size 16 in layers 1; 4 query heads, 1 KV heads, head size 16 in layers 5) "
        f"{BACKEND}the same heads and head size in every attention layer"
    )
    # Each of four ranks has one KV head of every layer
    ranks = cast("ParallelConfig", SimpleNamespace(tensor_parallel_size=4))
    config = configure(save_deci([2, 2]), trust_remote_code=True).model_config
    assert set(layer_sizes(config, ranks).values()) == {LayerSizes(1, 1, 16)}


def test_layers_that_transformers_keeps_apart_are_named(save_model: SaveModel) -> None:
    model = save_model(LLAMA | {"num_hidden_layers": 3, "per_layer_config": {"1": {"num_key_value_heads": 4}}})
    message = str(refusal(model))
    assert "2 KV heads, head size 16 in layers 0, 2; 4 query heads, 4 KV heads, head size 16 in layers 1)" in message


def test_runs_of_layers_are_told_as_ranges() -> None:
    small, large = LayerSizes(8, 1, 64), LayerSizes(8, 1, 128)
    told = describe_differences({layer: large if layer in {3, 9} else small for layer in range(10)})
    assert told == (
        "8 query heads, 1 KV heads, head size 64 in layers 0-2, 4-8; 8 query heads, 1 KV heads, head size 128 in "
        "layers 3, 9"
    )
    assert describe_differences({0: small, 4: small}) == ""


def test_a_worker_refuses_layers_of_different_sizes_too() -> None:
    """Where a model's configuration does not tell, its layers do."""
    layers = {
        name: cast("Attention", SimpleNamespace(num_heads=4, num_kv_heads=heads, head_size=16))
        for name, heads in (("a", 2), ("b", 4))
    }
    with pytest.raises(UnsupportedError, match=r"^model: 4 query heads, 2 KV heads, .* in layers 0; 4 .* in layers 1;"):
        sizing.attention_shape(layers, LayerSplit({}, {}), torch.device("cpu"))


def test_a_worker_refuses_values_of_another_size_than_keys(llama: Path) -> None:
    config = configure(llama)
    spec = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=16, head_size_v=8, dtype=torch.float32)
    budget = sizing.budget_policy(config, read_config(config), 32)
    with pytest.raises(UnsupportedError, match=r"keys of 16 elements and values of 8; .* equal sizes"):
        FlashMemorySpec.from_spec(spec, budget, llama)


@pytest.mark.parametrize("backend", ["native", "lmcache"])
def test_offloading_that_becomes_a_connector(llama: Path, backend: str) -> None:
    assert str(refusal(llama, kv_offloading_size=4.0, kv_offloading_backend=backend)) == (
        f"--kv-offloading-size: 4.0 {BACKEND}unset: KV blocks are in host memory already, "
        "flashmemory.host_memory_gib is how much of it"
    )


@pytest.mark.parametrize(("quantization", "asked"), [(COMPRESSED, "fp8"), (MODELOPT, "fp8_e4m3")])
def test_a_checkpoint_that_asks_for_a_quantised_cache(
    save_model: SaveModel, quantization: dict[str, Any], asked: str
) -> None:
    model = save_model(LLAMA | {"quantization_config": quantization})
    assert str(refusal(model, dtype="bfloat16")) == (
        f"model: {model} (a checkpoint that asks for a KV cache of {asked}) {BACKEND}--kv-cache-dtype bfloat16, which "
        "leaves its KV scales unused"
    )
    served = configure(model, dtype="bfloat16", kv_cache_dtype="bfloat16")
    assert served.cache_config.cache_dtype == "bfloat16"


def test_the_models_own_dtype_may_be_given(llama: Path) -> None:
    assert configure(llama, dtype="bfloat16", kv_cache_dtype="bfloat16").cache_config.cache_dtype == "bfloat16"


def test_a_window_that_is_switched_off(save_model: SaveModel) -> None:
    model = save_model({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 1024})
    assert configure(model, disable_sliding_window=True).model_config.max_model_len == 1024
    assert "or --disable-sliding-window for requests no longer than that" in str(refusal(model))


@pytest.mark.parametrize("config", [MISTRAL, GEMMA3], ids=["every layer", "some layers"])
def test_a_window_that_no_request_is_longer_than(save_model: SaveModel, config: dict[str, Any]) -> None:
    model = save_model({"sliding_window": 1024, **config})
    served = configure(model, max_model_len=1024)
    assert served.model_config.get_sliding_window() is None
    assert served.cache_config.sliding_window is None
    assert managed_layers(served.model_config) == [0, 1]


def test_a_window_that_a_request_may_be_longer_than(save_model: SaveModel) -> None:
    """Is refused in every layer, and is vLLM's own in some layers."""
    model = save_model({"sliding_window": 1024, **MISTRAL})
    assert "sliding window of 1024 tokens" in str(refusal(model, max_model_len=1025))
    model = save_model({"sliding_window": 1024, **GEMMA3})
    served = configure(model, max_model_len=1025)
    assert served.model_config.get_sliding_window() == 1024
    assert managed_layers(served.model_config) == [1]
    assert sizing._announced_shape(served).num_layers == 1
    message = str(refusal(model, max_model_len=1025, disable_hybrid_kv_cache_manager=True))
    assert (
        message
        == f"--disable-hybrid-kv-cache-manager: True {BACKEND}unset, for windows or states beside full attention"
    )


def test_states_are_vllms_own_beside_full_attention(save_model: SaveModel) -> None:
    kinds = ["linear_attention", "full_attention", "mlp"]
    sizes = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2}
    config = {"architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "layers_block_type": kinds}
    served = configure(save_model({**config, **sizes, "num_hidden_layers": 3}))
    assert managed_layers(served.model_config) == [1]


def test_names_of_layers_that_nobody_knows_tell_nothing() -> None:
    config = SimpleNamespace(layer_types=["one", "another"])
    model: Any = SimpleNamespace(
        hf_text_config=config, get_sliding_window=lambda: None, get_total_num_hidden_layers=lambda: 2
    )
    assert managed_layers(model) == [0, 1]


def test_a_speculator_as_the_model(save_model: SaveModel, tmp_path: Path) -> None:
    """VLLM takes the model that it was made for, and makes the option of it."""
    target = save_model(LLAMA)
    speculator = tmp_path / "speculator"
    speculator.mkdir()
    content = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": 128,
        "transformer_layer_config": json.loads((target / "config.json").read_text()),
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 2}],
            "verifier": {"name_or_path": str(target), "architectures": ["LlamaForCausalLM"]},
        },
    }
    (speculator / "config.json").write_text(json.dumps(content))
    message = str(refusal(speculator))
    assert message.startswith(f"--speculative-config: eagle3 with {speculator} {BACKEND}")


def test_tokens_by_the_short_names_of_speculation(llama: Path) -> None:
    assert "by --spec-method" in str(refusal(llama, spec_method="ngram", spec_tokens=2))


def test_one_option_on_the_command_line_replaces_those_of_the_file(tmp_path: Path) -> None:
    """As the page on configuration says: when vLLM starts to merge them, the page can change."""
    file = tmp_path / "config.yaml"
    file.write_text('additional-config: {"flashmemory": {"tau_steps": 4}}')
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    given = ["--config", str(file), "--additional-config.flashmemory.resident_ratio", "0.2"]
    arguments = parser.parse_args(["--model", "any", *given])
    assert arguments.additional_config == {"flashmemory": {"resident_ratio": 0.2}}


@pytest.mark.parametrize(
    ("options", "told"),
    [({"resident_ratio": 0.2, "mode": "pressure"}, "mode 'pressure', resident_ratio 0.2"), ({}, "none")],
)
def test_the_options_in_force_are_told(
    llama: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], told: str
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(checks.logger, "info_once", lambda message, *values: lines.append(message % values))
    configure(llama, options)
    assert lines == [f"flashmemory: options given: {told}; defaults for all others"]


def test_an_automatic_length_that_does_not_fit(llama: Path) -> None:
    """VLLM takes the model's own length first, and would make it shorter only after our check."""
    options = {"host_memory_gib": 101 * 16384 / 2**30}
    message = str(refusal(llama, options, max_model_len=-1))
    assert message.startswith(
        "--max-model-len: auto is the model's own 8192 tokens, allowed: a number, at most 3200 "
        "(flashmemory.host_memory_gib: "
    )
    assert configure(llama, options, max_model_len=3200).model_config.max_model_len == 3200
    assert "--max-model-len 3201 needs 102" in str(refusal(llama, options, max_model_len=3201))
    enough = {"host_memory_gib": 257 * 16384 / 2**30}
    assert configure(llama, enough, max_model_len=-1).model_config.max_model_len == 8192


def test_device_memory_by_an_environment_variable(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    message = str(refusal(llama, {"staging_blocks": 100_000}))
    assert message.startswith("VLLM_CPU_KVCACHE_SPACE: 1073741824 bytes of device memory makes ")
