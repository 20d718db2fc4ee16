"""Where the bytes of a block lie: device pages per layer, and their order in a host row; not what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from flashmemory_vllm.errors import ConfigError

# A byte of which every float format of a cache makes NaN
POISON = 0xFF


@dataclass(frozen=True, slots=True, eq=False)
class PageRun:
    """Layers of one group whose pages lie side by side on the device, so that one copy moves them all.

    Attributes:
        layers: the layers, in device order.
        host_start: first byte inside a row of the host pool.
        num_bytes: bytes of one block's run.
        device_pages: uint8 [S, num_bytes], strided view of the device cache.
    """

    layers: tuple[int, ...]
    host_start: int
    num_bytes: int
    device_pages: torch.Tensor


class PageLayout:
    """Describes the device KV cache of all layers and the row of a block in the host pool.

    A host row holds the pages of group 0, then group 1, and so on; inside a group the layers keep their
    order. Pages are copied as they lie in memory, so a permuted cache (heads outside tokens, or the reverse)
    stays permuted in the host pool.

    Args:
        caches: per layer a device tensor [S, ...page], dim 0 the slot with any stride. The page must fill one
            run of memory without holes; its dims may be permuted. Layers may differ in dtype and size of a page.
        groups: layer indices of each layer group. Default: one group of all layers.

    Raises:
        ConfigError: caches disagree in slots or device, a page has holes, or groups do not partition the layers.
    """

    def __init__(self, caches: Sequence[torch.Tensor], groups: Sequence[Sequence[int]] | None = None) -> None:
        if not caches:
            raise ConfigError("the page layout needs at least one layer's KV cache; got none")
        self.groups: tuple[tuple[int, ...], ...] = (
            (tuple(range(len(caches))),) if groups is None else tuple(tuple(group) for group in groups)
        )
        if sorted(layer for group in self.groups for layer in group) != list(range(len(caches))):
            raise ConfigError(f"layer groups must name each of {len(caches)} layers once; got {self.groups}")
        first = caches[0]
        self.num_layers = len(caches)
        self.num_slots = first.shape[0]
        self.device = first.device
        self._caches = tuple(caches)
        self._pages = tuple(self._flat_pages(layer, cache) for layer, cache in enumerate(caches))
        self._runs = self._merge_runs()
        # Of one block, all layers: a row of the host pool
        self.block_bytes = sum(pages.shape[1] for pages in self._pages)

    def layer_bytes(self, layer: int) -> int:
        """Bytes of one layer's page."""
        return self._pages[layer].shape[1]

    def page_view(self, layer: int) -> torch.Tensor:
        """The layer's device pages as uint8 [S, page_bytes], in memory order, without a copy."""
        return self._pages[layer]

    def cache(self, layer: int) -> torch.Tensor:
        """The layer's device cache [S, ...page] as it was given."""
        return self._caches[layer]

    def runs(self, group: int) -> tuple[PageRun, ...]:
        """The copies that move one block of a layer group."""
        return self._runs[group]

    def host_range(self, layer: int) -> slice:
        """Bytes of a host row that hold the layer's page."""
        start = 0
        for group in self.groups:
            for other in group:
                if other == layer:
                    return slice(start, start + self._pages[layer].shape[1])
                start += self._pages[other].shape[1]
        raise AssertionError(f"layer {layer} is in no group of {self.groups}")

    def unflatten(self, layer: int, pages: torch.Tensor) -> torch.Tensor:
        """View pages uint8 [n, page_bytes] as [n, ...page], of the cache's dtype and strided inside as it is."""
        cache = self._caches[layer]
        elems = pages.view(cache.dtype)
        return elems.as_strided((elems.shape[0], *cache.shape[1:]), (elems.stride(0), *cache.stride()[1:]))

    def _flat_pages(self, layer: int, cache: torch.Tensor) -> torch.Tensor:
        given = (cache.shape[0], cache.device)
        expected = (self.num_slots, self.device)
        if given != expected:
            raise ConfigError(f"layer {layer}: KV cache has (slots, device) {given}; layer 0 has {expected}")
        page_elems = prod(cache.shape[1:])
        inner = sorted(
            (stride, size) for size, stride in zip(cache.shape[1:], cache.stride()[1:], strict=True) if size > 1
        )
        dense = 1
        for stride, size in inner:
            if stride != dense:
                break
            dense *= size
        if dense != page_elems or cache.stride(0) < page_elems:
            raise ConfigError(
                f"layer {layer}: a page must fill one run of memory; got shape {tuple(cache.shape)}, "
                f"strides {cache.stride()}"
            )
        size = cache.element_size()
        return torch.empty(0, dtype=torch.uint8, device=cache.device).set_(
            cache.untyped_storage(),
            cache.storage_offset() * size,
            (self.num_slots, page_elems * size),
            (cache.stride(0) * size, 1),
        )

    def _merge_runs(self) -> tuple[tuple[PageRun, ...], ...]:
        merged, host_start = [], 0
        for group in self.groups:
            runs: list[PageRun] = []
            for layer in group:
                pages = self._pages[layer]
                if runs and _follows(runs[-1].device_pages, pages):
                    last = runs.pop()
                    num_bytes = last.num_bytes + pages.shape[1]
                    wide = last.device_pages.as_strided((self.num_slots, num_bytes), (pages.stride(0), 1))
                    runs.append(PageRun((*last.layers, layer), last.host_start, num_bytes, wide))
                else:
                    runs.append(PageRun((layer,), host_start, pages.shape[1], pages))
                host_start += pages.shape[1]
            merged.append(tuple(runs))
        return tuple(merged)


def _follows(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether each right page begins where the left page of the same slot ends, within one allocation."""
    return (
        left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
        and left.stride(0) == right.stride(0)
        and left.data_ptr() + left.shape[1] == right.data_ptr()
        # Layer-outermost caches touch too (last slot of one layer, first of the next) but only a stride that
        # spans both pages makes them one run in every slot.
        and left.stride(0) >= left.shape[1] + right.shape[1]
    )
