"""What kinds of layers a model's configuration tells of, for `flashmemory plan`."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.kinds.latents import unserved

if TYPE_CHECKING:
    from flashmemory_vllm.runtime.forecast import StateSizes

# Fields of configurations in which layers of full attention differ, or some have none: of DeciLM, of Transformers, of
# Gemma 4, of Step 3.5
DIFFERING_LAYERS = (
    "block_configs",
    "per_layer_config",
    "global_head_dim",
    "num_global_key_value_heads",
    "attention_other_setting",
)
FULL, WINDOW = frozenset({"full_attention", "attention"}), "sliding_attention"
# Names of layers with a state, and of those of Nemotron-H that keep nothing
STATES, NOTHING = frozenset({"linear_attention", "mamba"}), frozenset({"mlp", "moe"})
# Fields of the two kinds of models whose states the server takes, Nemotron-H and those with gated delta nets: heads,
# elements of a head, of a state, groups, tokens of the convolution, dtype
MAMBA = ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel", "mamba_ssm_cache_dtype")
DELTA = (
    "linear_num_value_heads",
    "linear_value_head_dim",
    "linear_key_head_dim",
    "linear_num_key_heads",
    "linear_conv_kernel_dim",
    "mamba_ssm_dtype",
)


class LayerKinds(NamedTuple):
    """How many layers keep what.

    Attributes:
        full: indices of those of full attention, to keys and values or to latents, which are managed.
        num_windows: those with a sliding window.
        window: tokens that such a layer attends to.
        num_states: those with a state.
        state: of such a layer.
    """

    full: tuple[int, ...]
    num_windows: int = 0
    window: int = 0
    num_states: int = 0
    state: "StateSizes | None" = None


def layer_kinds(fields: dict[str, Any], context: int | None = None) -> LayerKinds:
    """Count a model's layers by what they keep.

    Args:
        fields: the model's configuration.
        context: tokens of the longest request: no longer than a window, and there is none. Default: any.

    Raises:
        ConfigError: a field is missing, or the model is of a kind that the backend refuses.
    """
    names = list(fields.get("layer_types") or fields.get("layers_block_type") or ())
    needed = (*(() if names else ("num_hidden_layers",)), "num_attention_heads", "hidden_size")
    if missing := [name for name in needed if not fields.get(name)]:
        raise ConfigError(f"--model: its configuration has no {', '.join(missing)}, allowed is a decoder-only model")
    if differing := [name for name in DIFFERING_LAYERS if fields.get(name)]:
        raise ConfigError(
            f"--model: its layers differ ({', '.join(differing)}), allowed is one size of KV in all layers"
        )
    window = fields.get("sliding_window") or 0
    if not names:
        names = [WINDOW if window else "full_attention"] * fields["num_hidden_layers"]
    if not window or (context is not None and context <= window):
        names = ["full_attention" if name == WINDOW else name for name in names]
    is_nemotron = fields.get("model_type") == "nemotron_h"
    of_state = next((names for names in (MAMBA, DELTA) if all(fields.get(name) for name in names[:-1])), None)
    has_states = of_state is not None and bool(STATES & set(names))
    found = LayerKinds(
        full=tuple(index for index, name in enumerate(names) if name in FULL),
        num_windows=names.count(WINDOW),
        window=window if WINDOW in names else 0,
        num_states=sum(name in STATES for name in names) if has_states else 0,
        state=_state(fields, of_state) if of_state is not None and has_states else None,
    )
    if fields.get("kv_lora_rank") and (refused := unserved(SimpleNamespace(**fields), is_cpu=True)):
        raise ConfigError("--model: it has {}; allowed is {}".format(*refused))
    unknown = set(names) - FULL - {WINDOW} - (STATES if has_states else set()) - (NOTHING if is_nemotron else set())
    if fields.get("kv_lora_rank"):
        # Latents are not served beside other layers
        unknown = set(names) - FULL
    if unknown or not found.full:
        of = sorted(unknown or set(names))
        raise ConfigError(
            f"--model: it has layers of {', '.join(of)}; allowed is full attention, alone or beside sliding windows or "
            "states of Mamba 2 or gated delta nets"
        )
    return found


def _state(fields: dict[str, Any], names: tuple[str, ...]) -> "StateSizes":
    import torch

    from flashmemory_vllm.runtime.forecast import StateSizes
    from flashmemory_vllm.runtime.native import STATE_BLOCKS

    # Of Mamba 2 vLLM keeps one more, at the end of a prompt for prefix hits
    is_mamba = names is MAMBA
    heads, head_dim, state_size, groups, kernel = (int(fields[name]) for name in names[:-1])
    dtype = fields.get(names[-1]) or ("float32" if is_mamba else None)
    return StateSizes(
        num_heads=heads,
        head_dim=head_dim,
        state_size=state_size,
        num_groups=groups,
        conv_kernel=kernel,
        dtype=getattr(torch, str(dtype)) if dtype else None,
        num_blocks=STATE_BLOCKS + is_mamba,
    )
