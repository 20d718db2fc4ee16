"""The torch model is Qwen3: an exported checkpoint gives the same logits in transformers."""

import json
from pathlib import Path

import pytest
import torch

from flashmemory_vllm.evaluation import vocabulary as words
from flashmemory_vllm.reference.export import export_model
from flashmemory_vllm.reference.model import ReferenceConfig, ReferenceModel

TINY = ReferenceConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16)
# fp32 sums in another order: a few units in the last place of logits around one.
LOGIT_TOLERANCE = 2e-5


def _model() -> ReferenceModel:
    model = ReferenceModel(TINY)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("down_proj.weight"):
                weight.normal_(0, 0.1, generator=generator)
    return model


def test_transformers_agrees(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    export_model(_model(), tmp_path)
    ours = ReferenceModel.load(tmp_path, "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    token_ids = torch.randint(0, words.NUM_WORDS, (2, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(token_ids).logits
        actual = ours(token_ids, torch.arange(150))
    torch.testing.assert_close(actual, expected, atol=LOGIT_TOLERANCE, rtol=0)


def test_positions_select_logits() -> None:
    model = _model()
    token_ids = torch.randint(0, words.NUM_WORDS, (1, 20), generator=torch.Generator().manual_seed(1))
    everything = model(token_ids, torch.arange(20))
    torch.testing.assert_close(model(token_ids, torch.tensor([3, 19])), everything[:, [3, 19]])


def test_export_is_what_vllm_expects(tmp_path: Path) -> None:
    export_model(_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["torch_dtype"] == "bfloat16"
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)
    assert ReferenceConfig.load(tmp_path) == TINY


def test_the_default_fits_into_12_mb_of_bf16() -> None:
    num_parameters = sum(parameter.numel() for parameter in ReferenceModel(ReferenceConfig()).parameters())
    assert 2 * num_parameters <= 12_000_000


def test_initial_weights_follow_the_recipe() -> None:
    model = ReferenceModel(ReferenceConfig())
    model.init_weights(torch.Generator().manual_seed(0))
    weights = dict(model.named_parameters())
    assert weights["model.embed_tokens.weight"].std().item() == pytest.approx(1.0, rel=0.02)
    assert weights["lm_head.weight"].std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert weights["model.layers.3.mlp.gate_proj.weight"].std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert not weights["model.layers.3.mlp.down_proj.weight"].any()
    assert (weights["model.layers.3.self_attn.q_norm.weight"] == 1.5).all()
