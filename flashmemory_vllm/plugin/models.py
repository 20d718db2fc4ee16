"""What a model's configuration tells about its attention, before a model is loaded."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig


class LayerSizes(NamedTuple):
    """Sizes of one attention layer on one rank."""

    num_query_heads: int
    num_kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.num_query_heads} query heads, {self.num_kv_heads} KV heads, head size {self.head_dim}"


# What models name the kinds of their layers with
_FULL, _WINDOW = frozenset({"full_attention", "attention"}), "sliding_attention"


def managed_layers(model: "ModelConfig") -> list[int]:
    """Indices of the layers of full attention, as far as the model's configuration tells; of all layers if it does not.

    Args:
        model: vLLM's configuration of the model. Windows that it has dropped are none.
    """
    every = range(model.get_total_num_hidden_layers())
    plain = _FULL if model.get_sliding_window() is not None else _FULL | {_WINDOW}
    found = [index for index, kind in zip(every, _kinds(model), strict=False) if kind in plain]
    return found or list(every)


def _kinds(model: "ModelConfig") -> Sequence[str]:
    config = model.hf_text_config
    return getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()


def is_state_beside_full_attention(model: "ModelConfig") -> bool:
    """Whether some layers have a state and others attend to all tokens, by name."""
    return bool(model.is_hybrid) and bool(_FULL & set(_kinds(model)))


def is_window_beside_full_attention(model: "ModelConfig") -> bool:
    """Whether some layers have a sliding window and others attend to all tokens."""
    kinds = set(_kinds(model))
    return model.get_sliding_window() is not None and _WINDOW in kinds and bool(_FULL & kinds)


def layer_sizes(model: "ModelConfig", parallel: "ParallelConfig") -> dict[int, LayerSizes]:
    """Sizes of every layer of full attention, by its index among all layers.

    Args:
        model: vLLM's configuration of the model.
        parallel: vLLM's configuration of the ranks, which share heads.
    """
    sizes = {}
    for index in managed_layers(model):
        arch = model.model_arch_config[index]
        num_query_heads = model.get_num_attention_heads(parallel, arch)
        num_kv_heads = model.get_num_kv_heads(parallel, arch)
        if model.has_noops:
            # As vLLM's own `get_num_layers_by_block_type` and the one such model, DeciLM, read it
            attention = model.hf_config.block_configs[index].attention
            if attention.no_op:
                continue
            total = arch.total_num_attention_heads // attention.n_heads_in_group
            num_kv_heads = max(1, total // parallel.tensor_parallel_size)
        sizes[index] = LayerSizes(num_query_heads, num_kv_heads, arch.head_size)
    return sizes


def describe_differences(sizes: Mapping[int, LayerSizes]) -> str:
    """Layers by their sizes, in words; empty if all have the same."""
    if len(set(sizes.values())) < 2:
        return ""
    layers_of: dict[LayerSizes, list[int]] = {}
    for layer, found in sizes.items():
        layers_of.setdefault(found, []).append(layer)
    return "; ".join(f"{found} in layers {_ranges(layers)}" for found, layers in layers_of.items())


def _ranges(layers: Iterable[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda place: place[1] - place[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def ignore_windows_that_never_bind(vllm_config: "VllmConfig") -> bool:
    """Make layers with a sliding window plain ones if no request is longer than the window.

    As vLLM does for `--disable-sliding-window`, which caps the length at the window.

    Returns:
        Whether there was such a window.
    """
    model = vllm_config.model_config
    if model is None:
        return False
    window = model.get_sliding_window()
    if not isinstance(window, int) or model.max_model_len > window:
        return False
    model.hf_text_config.sliding_window = None
    vllm_config.cache_config.sliding_window = None
    return True
