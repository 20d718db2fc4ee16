"""Which attention layers are ours: those of plain full attention; all others stay on the device as vLLM has them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil, gcd
from typing import NamedTuple

from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    SparseCacheRole,
    iter_layer_specs,
)

from flashmemory_vllm.errors import UnsupportedError

# What may be beside managed layers
NATIVE_SPECS = (SlidingWindowSpec, MambaSpec)
# States beside which texts were shown to be vLLM's. Those of gated delta nets, in bf16, depend on where chunks of a
# prompt end, with stock vLLM as well: a small Qwen3-Next writes the same at equal batches. With prefix caching they are
# not: vLLM cuts a prompt where the last block of a hit may end, which is a managed one here
SHOWN_STATES = (MambaAttentionBackendEnum.MAMBA2, MambaAttentionBackendEnum.GDN_ATTN)
ALLOWED = "causal full attention in some layers, sliding windows or states in the others"


class LayerSplit(NamedTuple):
    """The layers of a model that keep KV, by name in depth order.

    Attributes:
        managed: ours. Their blocks move between host and device.
        native: vLLM's own, which stay on the device. Empty for a model of one kind of attention.
    """

    managed: dict[str, FullAttentionSpec]
    native: dict[str, KVCacheSpec]

    @property
    def block_size(self) -> int:
        """Tokens in a block of a managed layer."""
        return next(iter(self.managed.values())).block_size

    @property
    def native_page_bytes(self) -> int:
        """Bytes of the largest page of a native layer, which vLLM makes the page of all; 0 without any."""
        return max((spec.page_size_bytes for spec in self.native.values()), default=0)

    @property
    def announced(self) -> dict[str, FullAttentionSpec]:
        """The managed layers that vLLM is told of, as many as make one group of ours and no native group smaller.

        It makes groups as large as the smallest kind of layers, and a block as large as the largest group. With more of
        ours than of another kind there would be several groups of them; with more than the groups of the others come to
        have, a block would be larger than those need.
        """
        counts = Counter(self.native.values()).values()
        most = min((len(self.managed), *counts))
        width = max((ceil(count / ceil(count / most)) for count in counts), default=most)
        return dict(list(self.managed.items())[:width])


def split_layers(specs: Mapping[str, KVCacheSpec], asked_block_size: int) -> LayerSplit:
    """Tell managed layers from native ones.

    Args:
        specs: vLLM's cache spec of each layer, in depth order.
        asked_block_size: `--block-size`, before vLLM made blocks of attention as large as a state.

    Raises:
        UnsupportedError: no layer is ours, a layer can be neither, or a managed block does not divide the native ones.
    """
    # Latents are not served beside other layers
    is_ours = _is_latent if all(map(_is_latent, specs.values())) else _is_plain
    managed = {name: spec for name, spec in specs.items() if is_ours(spec)}
    native = {name: spec for name, spec in specs.items() if name not in managed}
    for name, spec in native.items():
        if not managed or type(spec) not in NATIVE_SPECS:
            raise UnsupportedError(f"model: layer {name} has KV cache spec {spec}; allowed: {ALLOWED}")
        if isinstance(spec, MambaSpec) and spec.mamba_type not in SHOWN_STATES:
            allowed = ", ".join(kind.name for kind in SHOWN_STATES)
            raise UnsupportedError(
                f"model: layer {name} has a state of kind {spec.mamba_type.name}; allowed: {allowed}"
            )
        if isinstance(spec, MambaSpec) and spec.mamba_cache_mode == "all":
            raise UnsupportedError(
                "--mamba-cache-mode: all is not supported with --attention-backend flashmemory; allowed: align"
            )
    if any(isinstance(spec, MambaSpec) for spec in native.values()):
        managed = {name: replace(spec, block_size=asked_block_size) for name, spec in managed.items()}
    split = LayerSplit(managed, native)
    # A state that is not kept for prefix hits is as long as a request
    sizes = [spec.block_size for spec in native.values() if getattr(spec, "mamba_cache_mode", "align") == "align"]
    if sizes and (common := gcd(*sizes)) % split.block_size:
        raise UnsupportedError(
            f"--block-size: layers of full attention have blocks of {split.block_size} tokens, which do not divide "
            f"those of the other layers, {common}; allowed are divisors of {common}"
        )
    return split


def _is_plain(spec: KVCacheSpec) -> bool:
    return (
        type(spec) is FullAttentionSpec
        and spec.sliding_window is None
        and spec.attention_chunk_size is None
        and not spec.non_causal
    )


def _is_latent(spec: KVCacheSpec) -> bool:
    return type(spec) is MLAAttentionSpec and spec.cache_role is SparseCacheRole.SPARSE


def find_managed(groups: Sequence[KVCacheGroupSpec], ours: type[KVCacheSpec]) -> int:
    """Index of the group that holds the managed layers.

    Args:
        groups: vLLM's KV cache groups.
        ours: class of the specs of managed layers.

    Raises:
        UnsupportedError: there is not exactly one, or it holds other layers too.
    """
    kinds = [{isinstance(spec, ours) for spec in iter_layer_specs(group.kv_cache_spec)} for group in groups]
    found = [index for index, kind in enumerate(kinds) if kind == {True}]
    if len(found) != 1 or any(len(kind) > 1 for kind in kinds):
        made = "; ".join(f"{len(group.layer_names)} layers of {type(group.kv_cache_spec).__name__}" for group in groups)
        raise UnsupportedError(f"model: vLLM makes the KV cache groups {made}; allowed: one with all managed layers")
    return found[0]
