"""Configurations of well-known models: Transformers reads them, and what they leave out is said in rows."""

from typing import Any

import pytest
from transformers import AutoConfig

from flashmemory_vllm.cli.plan_layers import layer_kinds
from flashmemory_vllm.cli.shapes import GPT_OSS_20B, LLAMA_8B, QWEN3_NEXT, SHAPES, shape_label


@pytest.mark.parametrize("fields", [LLAMA_8B, GPT_OSS_20B, QWEN3_NEXT], ids=lambda fields: fields["model_type"])
def test_fields_are_those_that_transformers_knows(fields: dict[str, Any]) -> None:
    given = {name: value for name, value in fields.items() if name not in {"architectures", "model_type"}}
    read = AutoConfig.for_model(fields["model_type"], **given).to_dict()
    assert {name: str(read[name]).removeprefix("torch.") for name in given} == {
        name: str(value) for name, value in given.items()
    }


def test_layers_are_full_beside_windows_or_states() -> None:
    oss, qwen = layer_kinds(GPT_OSS_20B, 131072), layer_kinds(QWEN3_NEXT)
    assert (oss.full, oss.num_windows, oss.window, oss.num_states) == (tuple(range(1, 24, 2)), 12, 128, 0)
    assert (qwen.full, qwen.num_windows, qwen.num_states) == (tuple(range(3, 48, 4)), 0, 36)


def test_a_label_says_what_differs() -> None:
    assert {name: shape_label(name) for name in SHAPES} == {
        "llama-8b": "llama-8b",
        "gpt-oss-20b": "gpt-oss-20b (experts in bfloat16)",
        "qwen3-next": "qwen3-next (64 of 512 experts)",
    }
