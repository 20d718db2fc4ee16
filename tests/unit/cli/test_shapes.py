"""Configurations of well-known models: Transformers reads them, and what they leave out is said in rows."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from flashmemory_vllm.cli.plan_layers import layer_kinds
from flashmemory_vllm.cli.shapes import (
    DEEPSEEK_V3,
    GPT_OSS_20B,
    LLAMA_8B,
    QWEN3_NEXT,
    SHAPES,
    shape_fields,
    shape_label,
    write_shape_tokenizer,
)
from flashmemory_vllm.errors import ConfigError
from tests.helpers.published import published_fields

ALL = [LLAMA_8B, GPT_OSS_20B, QWEN3_NEXT, DEEPSEEK_V3]


@pytest.mark.parametrize("fields", ALL, ids=lambda fields: fields["model_type"])
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
        "deepseek-v3": "deepseek-v3 (8 of 256 experts, weights in bfloat16)",
    }


def test_a_shape_of_latents_differs_from_the_published_model_where_it_says_so() -> None:
    published = published_fields("deepseek-v3")
    # What routes to experts; what has a default in Transformers that the published file replaces
    other = {"n_routed_experts", "n_group", "topk_group", "architectures", "rope_parameters", "pad_token_id"}
    other |= {"max_position_embeddings"}
    given = {name: value for name, value in DEEPSEEK_V3.items() if name not in other and name in published}
    assert given == {name: published[name] for name in given}
    assert {"kv_lora_rank", "q_lora_rank", "num_hidden_layers", "hidden_size", "moe_intermediate_size"} <= set(given)


def test_the_first_layers_of_a_shape_are_its_own() -> None:
    few = shape_fields("qwen3-next", 5)
    kinds = layer_kinds(few)
    assert (few["num_hidden_layers"], kinds.full, kinds.num_states) == (5, (3,), 4)
    assert few | {name: QWEN3_NEXT[name] for name in ("num_hidden_layers", "layer_types")} == QWEN3_NEXT
    assert layer_kinds(shape_fields("deepseek-v3", 2)).full == (0, 1)
    assert shape_label("deepseek-v3", 2).startswith("deepseek-v3 (2 of 61 layers, 8 of 256 experts")
    assert shape_label("llama-8b", 32) == "llama-8b"
    assert shape_label("llama-8b", 2) == "llama-8b (2 of 32 layers)"


@pytest.mark.parametrize("given", [0, 62])
def test_a_shape_has_so_many_layers(given: int) -> None:
    with pytest.raises(ConfigError, match=f"--layers is {given}: allowed for deepseek-v3 is 1 to 61"):
        shape_fields("deepseek-v3", given)


def test_any_ids_of_a_shape_survive_being_text(tmp_path: Path) -> None:
    """The load generator draws ids, sends them as text, and counts on as many tokens as it drew."""
    write_shape_tokenizer(tmp_path, "llama-8b")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = [3, 128255, 99_999, 3, 17]
    assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) == ids
    assert tokenizer.vocab_size == len(tokenizer) == LLAMA_8B["vocab_size"]
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2]
    assert tokenizer.num_special_tokens_to_add() == 0
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (LLAMA_8B["bos_token_id"], LLAMA_8B["eos_token_id"])
