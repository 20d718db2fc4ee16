"""Random models of a few hundred thousand parameters: greedy text from them changes with any wrong byte of KV."""

import random
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

VOCABULARY = 512


def save_tiny_llama(
    folder: Path, *, num_layers: int = 4, num_kv_heads: int = 2, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a seeded random Llama with grouped-query attention.

    Args:
        folder: where to; created.
        num_layers: decoder layers.
        num_kv_heads: KV heads for 8 query heads.
        dtype: dtype of the weights.

    Returns:
        The folder.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=num_kv_heads,
        head_dim=32,
        max_position_embeddings=8192,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    return folder


# Of models with windows of 64 tokens beside full attention
_HYBRID: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 64,
    "max_position_embeddings": 8192,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def save_tiny_gemma3(folder: Path, *, num_layers: int = 6) -> Path:
    """Write a seeded random Gemma 3, of which each sixth layer attends to all tokens and the others have a window.

    Args:
        folder: where to; created.
        num_layers: decoder layers.

    Returns:
        The folder.
    """
    torch.manual_seed(0)
    config = Gemma3TextConfig(num_hidden_layers=num_layers, intermediate_size=256, query_pre_attn_scalar=32, **_HYBRID)
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


def save_tiny_gpt_oss(folder: Path) -> Path:
    """Write a seeded random gpt-oss: four layers with attention sinks, of which two have a window; experts.

    Args:
        folder: where to; created.

    Returns:
        The folder.
    """
    torch.manual_seed(0)
    config = GptOssConfig(
        num_hidden_layers=4, intermediate_size=128, num_local_experts=4, num_experts_per_tok=2, **_HYBRID
    )
    model = GptOssForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.normal_(0, 1)
    model.save_pretrained(folder)
    return folder


def save_tiny_nemotron_h(folder: Path) -> Path:
    """Write a seeded random Nemotron-H: two layers with a state, two of full attention, two of neither.

    Args:
        folder: where to; created.

    Returns:
        The folder.
    """
    torch.manual_seed(0)
    kinds = ["linear_attention", "full_attention", "mlp"] * 2
    states = {"mamba_num_heads": 4, "mamba_head_dim": 64, "ssm_state_size": 64, "n_groups": 2}
    of_all = {name: value for name, value in _HYBRID.items() if name != "sliding_window"}
    config = NemotronHConfig(layers_block_type=kinds, intermediate_size=256, **states, **of_all)
    NemotronHForCausalLM(config).save_pretrained(folder)
    return folder


def save_tiny_qwen3_next(folder: Path, **changes: int) -> Path:
    """Write a seeded random Qwen3-Next: three layers with a gated delta net, one of full attention; experts.

    Args:
        folder: where to; created.
        changes: fields of its configuration that replace those here.

    Returns:
        The folder.
    """
    torch.manual_seed(1)
    heads = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    heads |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    of_all = {name: value for name, value in _HYBRID.items() if name != "sliding_window"}
    config = Qwen3NextConfig(
        num_hidden_layers=4,
        intermediate_size=256,
        shared_expert_intermediate_size=128,
        **(heads | experts | of_all | changes),
    )
    Qwen3NextForCausalLM(config).save_pretrained(folder)
    return folder


def save_tiny_deepseek_v3(folder: Path) -> Path:
    """Write a seeded random DeepSeek-V3: latent attention in four layers, the last two with experts.

    Latents have the size of the real model's, for which alone vLLM's CPU kernel is compiled. Positions are scaled as
    its are: on a CPU vLLM's plain rotary embedding takes queries that are a part of a wider tensor for whole ones.

    Args:
        folder: where to; created.

    Returns:
        The folder.
    """
    torch.manual_seed(0)
    latents = {"q_lora_rank": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    scaling = {"factor": 4.0, "original_max_position_embeddings": 2048, "mscale": 1.0, "mscale_all_dim": 1.0}
    config = DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        first_k_dense_replace=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        topk_method="noaux_tc",
        rope_scaling={"rope_type": "yarn", "rope_theta": 1e4, "beta_fast": 32, "beta_slow": 1, **scaling},
        **latents,
        **experts,
    )
    DeepseekV3ForCausalLM(config).save_pretrained(folder)
    return folder


def random_prompts(count: int, shortest: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random tokens, none of them special.

    Args:
        count: how many.
        shortest: least tokens of a prompt.
        longest: most tokens of a prompt.
        seed: of lengths and tokens.
    """
    rng = random.Random(seed)
    return [[rng.randrange(2, VOCABULARY) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]
