"""Configurations of models as they are published, without their weights and without a download."""

from typing import Any

from transformers import (
    DeepseekV3Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    NemotronHConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

_NEMOTRON = {"M": "linear_attention", "*": "full_attention", "E": "moe"}


def published_fields(name: str) -> dict[str, Any]:
    """The fields of a model's configuration that decide about memory.

    Args:
        name: of the model's file in `configs/`, if it has one.

    Raises:
        KeyError: no sizes of it are known here.
    """
    fields: dict[str, Any] = _PUBLISHED[name].to_dict()
    return fields | {"dtype": "bfloat16"}


_PUBLISHED = {
    "deepseek-v3": DeepseekV3Config(),
    "gpt-oss-20b": GptOssConfig(num_hidden_layers=24, num_local_experts=32),
    "gpt-oss-120b": GptOssConfig(),
    "gemma-3-27b": Gemma3TextConfig(
        num_hidden_layers=62,
        hidden_size=5376,
        intermediate_size=21504,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        sliding_window=1024,
    ),
    "nemotron-3-nano": NemotronHConfig(
        layers_block_type=[_NEMOTRON[kind] for kind in "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"],
        hidden_size=2688,
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=128,
        mamba_num_heads=64,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=8,
        conv_kernel=4,
    ),
    "qwen3-next-80b": Qwen3NextConfig(),
    "qwen3.5-27b": Qwen3_5TextConfig(
        num_hidden_layers=64,
        hidden_size=5120,
        intermediate_size=17408,
        num_attention_heads=24,
        num_key_value_heads=4,
        head_dim=256,
        linear_num_value_heads=48,
        mamba_ssm_dtype="float32",
    ),
    "llama-3.1-8b": LlamaConfig(
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336, vocab_size=128256
    ),
    "llama-3.1-70b": LlamaConfig(
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        hidden_size=8192,
        intermediate_size=28672,
        vocab_size=128256,
    ),
    "mistral-7b": MistralConfig(
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, sliding_window=None, vocab_size=32768
    ),
    "qwen3-8b": Qwen3Config(
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        hidden_size=4096,
        intermediate_size=12288,
    ),
    "qwen3-32b": Qwen3Config(
        num_hidden_layers=64,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        hidden_size=5120,
        intermediate_size=25600,
    ),
}
