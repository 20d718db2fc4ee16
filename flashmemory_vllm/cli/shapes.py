"""Configurations of well-known models, to plan with or to serve with random weights where none is at hand."""

from pathlib import Path
from typing import Any, NamedTuple

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.files import write_json

# What a configuration needs beside the sizes that differ
_REST: dict[str, Any] = {"hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
# Its other sizes are those of Llama 3.1 8B
LLAMA_8B: dict[str, Any] = _REST | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "max_position_embeddings": 1 << 20,
}
# As `openai/gpt-oss-20b`, but for the MXFP4 of its experts: random weights are in bfloat16
GPT_OSS_20B: dict[str, Any] = _REST | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "num_hidden_layers": 24,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "sliding_window": 128,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "attention_bias": True,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "swiglu_limit": 7.0,
    "vocab_size": 201088,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "max_position_embeddings": 131072,
}
# As `Qwen/Qwen3-Next-80B-A3B-Instruct`, but for seven of eight experts, which one GPU has no room for
QWEN3_NEXT: dict[str, Any] = _REST | {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "num_hidden_layers": 48,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_experts": 64,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "rms_norm_eps": 1e-6,
    "partial_rotary_factor": 0.25,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25},
    "max_position_embeddings": 262144,
}
# As `deepseek-ai/DeepSeek-V3`, but for eight of 256 experts, of which each token goes to all, and weights in fp8
DEEPSEEK_V3: dict[str, Any] = _REST | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "vocab_size": 129280,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "max_position_embeddings": 163840,
}


class Shape(NamedTuple):
    """A model without weights.

    Attributes:
        fields: of its configuration.
        differs: in words, from the model that it is named after; empty if in nothing that a step's time depends on.
    """

    fields: dict[str, Any]
    differs: str = ""


SHAPES = {
    "llama-8b": Shape(LLAMA_8B),
    "gpt-oss-20b": Shape(GPT_OSS_20B, "experts in bfloat16"),
    "qwen3-next": Shape(QWEN3_NEXT, "64 of 512 experts"),
    "deepseek-v3": Shape(DEEPSEEK_V3, "8 of 256 experts, weights in bfloat16"),
}


def shape_fields(name: str, num_layers: int | None = None) -> dict[str, Any]:
    """The configuration of a shape.

    Args:
        name: of the shape.
        num_layers: the first so many of its layers. Default: all.

    Raises:
        ConfigError: it has not so many.
    """
    fields = SHAPES[name].fields
    if num_layers is None:
        return fields
    if not 1 <= num_layers <= fields["num_hidden_layers"]:
        raise ConfigError(f"--layers is {num_layers}: allowed for {name} is 1 to {fields['num_hidden_layers']}")
    kinds = {"layer_types": fields["layer_types"][:num_layers]} if "layer_types" in fields else {}
    return fields | {"num_hidden_layers": num_layers} | kinds


def shape_label(name: str, num_layers: int | None = None) -> str:
    """A shape's name and what differs, for rows; as `shape_fields`."""
    most = SHAPES[name].fields["num_hidden_layers"]
    layers = f"{num_layers} of {most} layers" if num_layers not in {None, most} else ""
    differs = ", ".join(filter(None, (layers, SHAPES[name].differs)))
    return f"{name} ({differs})" if differs else name


def write_shape_tokenizer(folder: Path, name: str) -> None:
    """Write a tokenizer beside a shape's configuration: each token is a word, so that any ids survive being text.

    Args:
        folder: of the configuration.
        name: of the shape.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    fields = SHAPES[name].fields
    special = {role: f"<{role}>" for role in ("bos", "eos", "pad")}
    vocabulary = {f"w{index}": index for index in range(fields["vocab_size"])}
    for role, word in special.items():
        del vocabulary[f"w{fields[f'{role}_token_id']}"]
        vocabulary[word] = fields[f"{role}_token_id"]
    # A word that it does not know is padding: WordLevel wants one, and the vocabulary has no room for more
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=special["pad"]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special.values()])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": word for role, word in special.items()},
        "unk_token": special["pad"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["max_position_embeddings"],
    }
    write_json(folder / "tokenizer_config.json", settings)
