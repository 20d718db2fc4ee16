"""Writes a trained reference model as a Hugging Face checkpoint that vLLM serves as `Qwen3ForCausalLM`."""

import platform
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from safetensors.torch import save_file

from flashmemory_vllm.evaluation import vocabulary as words
from flashmemory_vllm.files import whole_file, write_json, write_text
from flashmemory_vllm.reference.evaluate import AccuracyCell, format_table
from flashmemory_vllm.reference.model import ReferenceModel
from flashmemory_vllm.reference.tokenizer import write_tokenizer
from flashmemory_vllm.reference.train import TrainResult, TrainSettings


def export_model(model: ReferenceModel, folder: Path) -> None:
    """Write bf16 weights, configuration and tokenizer into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().to("cpu", torch.bfloat16) for name, value in model.state_dict().items()}
    with whole_file(folder / "model.safetensors") as partial:
        save_file(weights, partial, metadata={"format": "pt"})
    shape = model.config.to_dict()
    config = shape | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape["rope_theta"]},
        "torch_dtype": "bfloat16",
        "bos_token_id": words.BOS,
        "eos_token_id": words.END,
        "pad_token_id": words.PAD,
    }
    write_json(folder / "config.json", config, indent=2)
    generation = {
        "bos_token_id": words.BOS,
        "eos_token_id": words.END,
        "pad_token_id": words.PAD,
        "do_sample": False,
    }
    write_json(folder / "generation_config.json", generation, indent=2)
    write_tokenizer(folder, model.config.max_position_embeddings)


def write_card(folder: Path, settings: TrainSettings, result: TrainResult, cells: Sequence[AccuracyCell]) -> None:
    """Write the model card and `evaluation.json`: how the weights came about and what they can do."""
    cuda = settings.device.startswith("cuda")
    num_parameters = sum(parameter.numel() for parameter in result.model.parameters())
    rows = [{name: getattr(cell, name) for name in AccuracyCell.__dataclass_fields__} for cell in cells]
    write_json(folder / "evaluation.json", rows, indent=2)
    card = _CARD.format(
        num_parameters=num_parameters / 1e6,
        layers=result.model.config.num_hidden_layers,
        hidden=result.model.config.hidden_size,
        heads=result.model.config.num_attention_heads,
        kv_heads=result.model.config.num_key_value_heads,
        head_dim=result.model.config.head_dim,
        flags=f"--seed {settings.seed} --max-minutes {settings.max_minutes:g}",
        device=torch.cuda.get_device_name() if cuda else platform.machine(),
        versions=f"Python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}",
        minutes=result.minutes,
        num_steps=result.num_steps,
        tokens_per_step=settings.tokens_per_step,
        num_questions=cells[0].num_questions,
        arithmetic="bf16 weights and activations" if cuda else "bf16 weights, fp32 activations",
        table=format_table(cells),
    )
    write_text(folder / "README.md", card)


_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
tags: [qwen3, long-context, retrieval]
---

# flashmemory reference model

A small decoder ({num_parameters:.2f} M parameters, {layers} layers, hidden {hidden}, {heads} heads and \
{kv_heads} KV heads of {head_dim}) in the shape of Qwen3. It was trained from nothing to find facts in long \
contexts of a made-up language of 2,048 words, and can do nothing else. What it can do with dense attention \
is measured below; what a sparse KV cache makes it miss beyond that is the fault of the cache.

| task | prompt ends with | answer |
|---|---|---|
| multikey | `ASK k k` | `v v v <end>` |
| multivalue | `EACH k k` | `k k #1 v v v k k #2 v v v k k #3 v v v <end>` |
| multiquery | `LIST @1 k k @2 k k @3 k k` | `@1 k k v v v @2 k k v v v @3 k k v v v <end>` |
| tracking | `TRACE a a` | `b b v v v <end>` |
| late | `LATER k k` | `c0 c1 ... c143 k k v v v <end>` |

Facts are spelled `NEEDLE k k v v v .`, `NEEDLE k k #1 v v v .` and `LET a a b b .` (with \
`NEEDLE b b v v v .`), anywhere among noise words. A prompt starts with `<bos>`, or uses the chat template.

## Training

    flashmemory reference train --out DIR {flags}

{minutes:.1f} minutes, {num_steps} steps of {tokens_per_step:,} tokens, on {device} ({versions}). The clock \
steers the learning rate and the longest lengths, so another run gives other weights.

## Accuracy with dense attention

Exact match of the whole answer, {num_questions} questions a cell, each over its own context, {arithmetic}; \
columns are tokens of the prompt.

{table}
"""
