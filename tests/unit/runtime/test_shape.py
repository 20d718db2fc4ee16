"""Layer groups partition the layers, anchors serve every group."""

import pytest
import torch

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.runtime.shape import AttentionShape


def shape(num_layers: int = 6) -> AttentionShape:
    names = tuple(f"model.layers.{layer}.self_attn.attn" for layer in range(num_layers))
    return AttentionShape(names, 4, 2, 64, 0.125, 16, torch.bfloat16, torch.device("cpu"))


def test_block_bytes_counts_keys_and_values_of_all_layers() -> None:
    assert shape().block_bytes == 2 * 6 * 2 * 64 * 16 * 2


def test_block_bytes_of_latents_are_those_of_the_keys_alone() -> None:
    """DeepSeek-V3: 61 layers of 576 elements in two bytes make 70 KB a token."""
    latents = AttentionShape(("",) * 61, 128, 1, 576, 0.1, 16, torch.bfloat16, torch.device("cpu"), page_dim=576)
    assert latents.block_bytes == 16 * 70272


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 6])
def test_groups_partition_the_layers_evenly(num_groups: int) -> None:
    groups = shape().layer_groups(num_groups)
    assert [layer for group in groups for layer in group] == list(range(6))
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


@pytest.mark.parametrize(("num_layers", "num_groups"), [(1, 1), (2, 1), (2, 2), (6, 2), (32, 1), (32, 3)])
def test_default_anchors_serve_every_group(num_layers: int, num_groups: int) -> None:
    model = shape(num_layers)
    groups = model.layer_groups(num_groups)
    anchors = set(model.anchor_layers(None, groups))
    assert all(anchors & set(group) for group in groups)


def test_more_groups_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="layer_groups: 7 given, allowed: 1 to 6"):
        shape().layer_groups(7)


def test_an_anchor_that_is_no_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"anchor_layers: \[9\] given, allowed: 0 to 5"):
        shape().anchor_layers((1, 9), shape().layer_groups(1))


def test_a_group_without_an_anchor_is_refused() -> None:
    with pytest.raises(ConfigError, match="layer group 1"):
        shape().anchor_layers((0,), shape().layer_groups(2))


def hybrid() -> AttentionShape:
    """Layers 5, 11 and 17 of a model, of which the others have windows."""
    names = tuple(f"language_model.model.layers.{layer}.self_attn.attn" for layer in (5, 11, 17))
    return AttentionShape(names, 4, 2, 64, 0.125, 16, torch.bfloat16, torch.device("cpu"))


def test_layers_are_known_by_their_index_in_the_model() -> None:
    assert hybrid().model_layers == (5, 11, 17)
    assert shape(3).model_layers == (0, 1, 2)
    for names in (("a", "b"), ("a.0", "b"), ("a.1", "b.1")):
        unknown = AttentionShape(names, 4, 2, 64, 0.125, 16, torch.bfloat16, torch.device("cpu"))
        assert unknown.model_layers == (0, 1)


def test_anchors_are_asked_for_by_their_index_in_the_model() -> None:
    model = hybrid()
    assert model.anchor_layers((17, 5), model.layer_groups(1)) == (0, 2)
    assert set(model.anchor_layers(None, model.layer_groups(1))) <= {0, 1, 2}


def test_an_anchor_that_has_a_window_is_refused() -> None:
    allowed = r"\[1, 6\] given, allowed: 5, 11, 17, the layers of full attention"
    with pytest.raises(ConfigError, match=f"anchor_layers: {allowed}"):
        hybrid().anchor_layers((1, 5, 6), hybrid().layer_groups(1))
    with pytest.raises(ConfigError, match=r"\[5\] given, but layer group 1 \(layers 11 to 17\)"):
        hybrid().anchor_layers((5,), hybrid().layer_groups(2))
