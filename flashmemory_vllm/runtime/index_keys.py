"""Index keys of blocks that became full, made from their device pages."""

from functools import cache

import numpy as np
import torch

from flashmemory_vllm.residency.types import WriteBacks
from flashmemory_vllm.runtime.parts import RuntimeParts


def index_full_blocks(parts: RuntimeParts, full: WriteBacks) -> None:
    """Have the selector make its keys, if it needs any.

    Args:
        parts: the runtime's.
        full: blocks and their slots.
    """
    if not parts.selector.needs_keys or not len(full.blocks):
        return
    count = len(full.blocks)
    # One upload. The ids of a group begin at a multiple of 16 bytes, for which kernels are compiled
    ids = np.zeros((1 + len(parts.groups), count + count % 2), np.int64)
    ids[0, :count], ids[1:, :count] = full.blocks, full.slots
    on_device = parts.id_ring.upload(ids.reshape(-1).view(np.int32)).view(torch.int64)
    block_ids, *slots_of = on_device.view(ids.shape)[:, :count]
    slots = [slots_of[group] for group in _groups_of(parts.anchors, parts.groups)]
    if parts.kind.page_format.keys_are_views:
        keys = [_views(parts, layer) for layer in parts.anchors]
        parts.choices.guard.add_blocks(full.blocks, block_ids, keys, slots)
    else:
        keys = [
            _keys(parts, layer, parts.engine.layout.page_view(layer).index_select(0, at))
            for layer, at in zip(parts.anchors, slots, strict=True)
        ]
        parts.choices.guard.add_blocks(full.blocks, block_ids, keys)


@cache
def _groups_of(anchors: tuple[int, ...], groups: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """Layer group of each anchor layer."""
    group_of = {layer: group for group, layers in enumerate(groups) for layer in layers}
    return tuple(group_of[layer] for layer in anchors)


def _views(parts: RuntimeParts, layer: int) -> torch.Tensor:
    """Keys [S, Hkv, block_size, D] of a layer's device pages, which stay where they are."""
    if layer not in parts.key_views:
        parts.key_views[layer] = _keys(parts, layer, parts.engine.layout.page_view(layer))
    return parts.key_views[layer]


def _keys(parts: RuntimeParts, layer: int, pages: torch.Tensor) -> torch.Tensor:
    """Keys [n, Hkv, block_size, D] of a layer's pages uint8 [n, page_bytes]."""
    return parts.kind.page_format.keys(parts.engine.layout.unflatten(layer, pages))
