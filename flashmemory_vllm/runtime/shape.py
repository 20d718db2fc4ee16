"""What the worker knows about the model's attention, translated once from vLLM's objects."""

from dataclasses import dataclass
from itertools import pairwise

import torch

from flashmemory_vllm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes of this rank's attention layers; filled by the worker from the model's layers.

    Attributes:
        layer_names: vLLM's layer names in depth order; a layer's index is its place here.
        num_query_heads: query heads of this rank.
        num_kv_heads: KV heads of this rank.
        head_dim: elements of a key.
        softmax_scale: factor on `q . k`.
        block_size: tokens in a block.
        dtype: dtype of keys and values.
        device: the worker's device.
        page_dim: elements that a page holds of a token and KV head. Default: None, a key and a value, 2 * D.
    """

    layer_names: tuple[str, ...]
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    softmax_scale: float
    block_size: int
    dtype: torch.dtype
    device: torch.device
    page_dim: int | None = None

    @property
    def num_layers(self) -> int:
        """Attention layers of this rank."""
        return len(self.layer_names)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's pages over all layers."""
        of_token = 2 * self.head_dim if self.page_dim is None else self.page_dim
        return self.num_layers * self.num_kv_heads * of_token * self.block_size * self.dtype.itemsize

    def layer_groups(self, num_groups: int) -> tuple[tuple[int, ...], ...]:
        """Split the layers into groups of neighbours, as even as possible.

        Raises:
            ConfigError: more groups than layers.
        """
        if num_groups > self.num_layers:
            raise ConfigError(
                f"flashmemory.layer_groups: {num_groups} given, allowed: 1 to {self.num_layers} (attention layers)"
            )
        bounds = [self.num_layers * group // num_groups for group in range(num_groups + 1)]
        return tuple(tuple(range(start, stop)) for start, stop in pairwise(bounds))

    @property
    def model_layers(self) -> tuple[int, ...]:
        """The index of each layer among all layers of the model, as its name says; where names do not, its place."""
        found = [next((int(part) for part in name.split(".") if part.isdigit()), None) for name in self.layer_names]
        known = tuple(index for index in found if index is not None)
        return known if len(set(known)) == self.num_layers else tuple(range(self.num_layers))

    def anchor_layers(self, given: tuple[int, ...] | None, groups: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
        """The layers whose queries and keys feed the selector.

        Args:
            given: indices among all layers of the model, or None for the default: three a group, at 1/3, 1/2 and 2/3
                of its depth, where models that were looked into keep the heads that retrieve.
            groups: layer indices of each layer group.

        Returns:
            Indices among the attention layers, ascending.

        Raises:
            ConfigError: an index is no layer of ours, or a group is left without an anchor.
        """
        if given is None:
            chosen = {group[len(group) * sixth // 6] for group in groups for sixth in (2, 3, 4)}
            return tuple(sorted(chosen))
        known = self.model_layers
        if outside := [layer for layer in given if layer not in known]:
            allowed = f"0 to {self.num_layers - 1}"
            if known != tuple(range(self.num_layers)):
                allowed = f"{', '.join(map(str, known))}, the layers of full attention"
            raise ConfigError(f"flashmemory.anchor_layers: {outside} given, allowed: {allowed}")
        places = {known.index(layer) for layer in given}
        for index, group in enumerate(groups):
            if not set(group) & places:
                raise ConfigError(
                    f"flashmemory.anchor_layers: {list(given)} given, but layer group {index} "
                    f"(layers {known[group[0]]} to {known[group[-1]]}) needs at least one"
                )
        return tuple(sorted(places))
