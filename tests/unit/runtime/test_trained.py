"""Steps that follow from options and model: how much of a question is kept, how often a request is selected for."""

from pathlib import Path

import torch

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.runtime.shape import AttentionShape
from flashmemory_vllm.runtime.trained import anchor_layers, hysteresis, num_kept, opening_steps, query_window, tau_steps
from tests.helpers.indexers import save_untrained


def test_the_question_is_as_long_as_trained_unless_another_is_asked_for(tmp_path: Path) -> None:
    indexer = str(save_untrained(tmp_path / "toy.safetensors", query_window=12))
    assert query_window(FlashMemoryConfig()) == 1
    assert query_window(FlashMemoryConfig(query_window=7)) == 7
    assert query_window(FlashMemoryConfig(indexer=indexer)) == 12
    assert query_window(FlashMemoryConfig(indexer=indexer, query_window=3)) == 3


def test_an_opening_is_as_long_as_trained_unless_another_is_asked_for(tmp_path: Path) -> None:
    indexer = str(save_untrained(tmp_path / "toy.safetensors", opening_steps=3))
    assert opening_steps(FlashMemoryConfig()) == 0
    assert opening_steps(FlashMemoryConfig(opening_steps=4)) == 4
    assert opening_steps(FlashMemoryConfig(indexer=indexer)) == 3
    assert opening_steps(FlashMemoryConfig(indexer=indexer, opening_steps=0)) == 0


def test_tau_is_the_trained_one_unless_another_is_asked_for(tmp_path: Path) -> None:
    indexer = str(save_untrained(tmp_path / "toy.safetensors", tau=48))
    assert tau_steps(FlashMemoryConfig(selector="exact")) == 4
    assert tau_steps(FlashMemoryConfig(selector="h2o")) == 16
    assert tau_steps(FlashMemoryConfig(indexer=indexer)) == 48
    assert tau_steps(FlashMemoryConfig(indexer=indexer, tau_steps=5)) == 5


def test_an_indexer_that_forecasts_remembers_all_tokens_and_prefers_what_is_held(tmp_path: Path) -> None:
    without = str(save_untrained(tmp_path / "without.safetensors", tau=8))
    forecasting = str(save_untrained(tmp_path / "toy.safetensors", tau=8, memory_decays=(0.0, 0.9)))
    assert (num_kept(FlashMemoryConfig(indexer=without)), hysteresis(FlashMemoryConfig(indexer=without))) == (2, 0)
    config = FlashMemoryConfig(indexer=forecasting)
    assert (num_kept(config), hysteresis(config)) == (9, 1)
    assert num_kept(FlashMemoryConfig(indexer=forecasting, tau_steps=3)) == 4
    assert hysteresis(FlashMemoryConfig(indexer=forecasting, hysteresis=0.0)) == 0
    assert hysteresis(FlashMemoryConfig(selector="exact")) == 1


def test_queries_are_kept_for_a_selection_and_the_running_step() -> None:
    assert num_kept(FlashMemoryConfig(selector="exact")) == 5
    assert num_kept(FlashMemoryConfig(selector="exact", tau_steps=9)) == 10
    assert num_kept(FlashMemoryConfig(selector="exact", tau_steps=9, memory_decay=0.0)) == 2
    assert num_kept(FlashMemoryConfig(selector="h2o", tau_steps=9)) == 2


def test_anchors_of_an_indexer_are_counted_among_the_layers_of_full_attention(tmp_path: Path) -> None:
    """Those that are asked for are named by their index in the model."""
    trained = {"indexer": str(save_untrained(tmp_path / "toy.safetensors", num_layers=3, anchor_layers=(0, 2)))}
    names = tuple(f"model.layers.{layer}.self_attn.attn" for layer in (5, 11, 17))
    shape = AttentionShape(names, 4, 2, 16, 1.0, 32, torch.bfloat16, torch.device("cpu"))
    assert anchor_layers(FlashMemoryConfig.model_validate(trained), shape) == (0, 2)
    assert anchor_layers(FlashMemoryConfig.model_validate({**trained, "anchor_layers": [11]}), shape) == (1,)
