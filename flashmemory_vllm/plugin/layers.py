"""Which attention layers are ours: those of plain full attention; all others stay on the device as vLLM has them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import ceil, gcd
from typing import NamedTuple

from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    SlidingWindowSpec,
    iter_layer_specs,
)

from flashmemory_vllm.errors import UnsupportedError

# What may be beside managed layers
NATIVE_SPECS = (SlidingWindowSpec,)
ALLOWED = "causal full attention in some layers, sliding windows in the others"


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


def split_layers(specs: Mapping[str, KVCacheSpec]) -> LayerSplit:
    """Tell managed layers from native ones.

    Args:
        specs: vLLM's cache spec of each layer, in depth order.

    Raises:
        UnsupportedError: no layer is ours, a layer can be neither, or a managed block does not divide the native ones.
    """
    managed = {name: spec for name, spec in specs.items() if _is_plain(spec)}
    native = {name: spec for name, spec in specs.items() if name not in managed}
    for name, spec in native.items():
        if not managed or type(spec) not in NATIVE_SPECS:
            raise UnsupportedError(f"model: layer {name} has KV cache spec {spec}; allowed: {ALLOWED}")
    split = LayerSplit(managed, native)
    if native and (common := gcd(*(spec.block_size for spec in native.values()))) % split.block_size:
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
