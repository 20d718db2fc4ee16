"""What serving will remember of a document's blocks at each of its tokens, from the shares that were recorded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from flashmemory_kernels.forecast_blocks import mixed as mixed_blocks
from flashmemory_kernels.remember_shares import remembered

from flashmemory_vllm.indexer.forecast_model import MIX_WEIGHTS, with_neighbours

_LARGEST = 0

IntArray = npt.NDArray[np.int64]


def replay(shares: torch.Tensor, positions: IntArray, decays: Sequence[float]) -> torch.Tensor:
    """Memory after each token, as `remember_shares` makes it with channels of these decays by the largest share.

    It does not matter after how many tokens a memory is brought up to date, as long as it is with the queries of all.

    Args:
        shares: [T, N], largest share that any head of the anchor layers pays with each token; 0 without a block.
        positions: int64 [T], of the tokens, ascending.
        decays: of the channels, in 0..1.

    Returns:
        float32 [T, C, N].
    """
    by_token, by_channel = shares.float(), torch.tensor(decays).view(-1, 1)
    memory = torch.empty(len(shares), len(decays), shares.shape[1])
    newest, alone = torch.zeros(memory.shape[1:]), torch.ones(())
    before = int(positions[0]) if len(positions) else 0
    for token, position in enumerate(positions.tolist()):
        elapsed = torch.tensor(position - before)
        newest = remembered(newest, by_token[token].view(1, 1, -1), alone, elapsed, by_channel, _LARGEST)
        memory[token], before = newest, position
    return memory


def mixed(memory: torch.Tensor) -> torch.Tensor:
    """Worth of blocks [..., N], of a memory [..., 2, N] with `MIX_DECAYS`, each no less than half of the one before."""
    return mixed_blocks(with_neighbours(memory), torch.tensor(MIX_WEIGHTS))
