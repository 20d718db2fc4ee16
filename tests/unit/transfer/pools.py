"""Device caches of the shapes vLLM makes, for the transfer tests."""

from __future__ import annotations

from collections.abc import Callable

import torch

NUM_SLOTS, NUM_HEADS, BLOCK_SIZE, HEAD_DIM = 7, 2, 4, 6
PAGE_ELEMS = NUM_HEADS * BLOCK_SIZE * 2 * HEAD_DIM
# Of a float32 page
PAGE_BYTES = 4 * PAGE_ELEMS


def layer_outermost(num_layers: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """LBHNC: one allocation, layer after layer, each [S, Hkv, block_size, 2 * D]."""
    return list(torch.zeros(num_layers, NUM_SLOTS, NUM_HEADS, BLOCK_SIZE, 2 * HEAD_DIM, dtype=dtype))


def block_outermost(num_layers: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """BLNHC: layers of a block contiguous, tokens outside heads, viewed as [S, Hkv, block_size, 2 * D]."""
    caches = torch.zeros(NUM_SLOTS, num_layers, BLOCK_SIZE, NUM_HEADS, 2 * HEAD_DIM, dtype=dtype)
    return list(caches.permute(1, 0, 3, 2, 4))


MakeCaches = Callable[..., list[torch.Tensor]]

CACHES: dict[str, MakeCaches] = {"layer_outermost": layer_outermost, "block_outermost": block_outermost}
