"""LoRA adapters with random weights, for any decoder whose attention has the usual projections."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.files import whole_file, write_json

RANK = 8
# Large enough that most texts differ from those without an adapter
_SCALE = 0.05


def write_adapter(model: Path, folder: Path, seed: int) -> Path:
    """Write an adapter of the query and value projections of every layer.

    Args:
        model: folder of the model it is for.
        folder: where to; created.
        seed: of its weights.

    Returns:
        The folder.

    Raises:
        ConfigError: the model's configuration lacks a size.
        StorageError: the disk is full.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        num_layers, kv_heads = config["num_hidden_layers"], config.get("num_key_value_heads", heads)
    except KeyError as error:
        raise ConfigError(f"--model {model}: its config.json has no {error}; allowed without: --adapters 0") from None
    head_dim = config.get("head_dim") or hidden // heads
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(num_layers):
        for name, size in (("q_proj", heads * head_dim), ("v_proj", kv_heads * head_dim)):
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(RANK, hidden, generator=generator) * _SCALE
            tensors[f"{place}.lora_B.weight"] = torch.randn(size, RANK, generator=generator) * _SCALE
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "adapter_model.safetensors") as partial:
        save_file(tensors, partial)
    described = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj", "v_proj"]}
    described |= {"bias": "none", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(model)}
    write_json(folder / "adapter_config.json", described, indent=None)
    return folder
