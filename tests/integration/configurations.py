"""Builds the engine's configuration as `vllm serve` does, of models that are a configuration and no weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from flashmemory_vllm.errors import FlashMemoryError, RefusedError

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 8192,
    "torch_dtype": "float32",
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def save_config(folder: Path, config: Mapping[str, Any]) -> Path:
    """Write a model folder that has a configuration and no weights.

    Args:
        folder: where to; created.
        config: what differs from `SIZES`.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SIZES | dict(config)))
    return folder


def configure(model: Path, options: Mapping[str, Any] | None = None, **engine: Any) -> VllmConfig:
    """The configuration that `vllm serve MODEL --attention-backend flashmemory` builds first."""
    arguments: dict[str, Any] = {"block_size": 32, "dtype": "float32", "skip_tokenizer_init": True, **engine}
    additional = {"flashmemory": dict(options or {})}
    return EngineArgs(
        model=str(model), attention_backend="flashmemory", additional_config=additional, **arguments
    ).create_engine_config()


def refusal(model: Path, options: Mapping[str, Any] | None = None, **engine: Any) -> FlashMemoryError:
    """The one error with which a configuration is refused: as it is, not within a validation error of vLLM's."""
    with pytest.raises(RefusedError) as caught:
        configure(model, options, **engine)
    error = caught.value.__cause__
    assert isinstance(error, FlashMemoryError)
    assert str(error) == str(caught.value)
    assert "\n" not in str(error)
    return error
