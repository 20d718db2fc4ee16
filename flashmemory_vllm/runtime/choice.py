"""What the device knows of decoding requests: their newest queries, what their blocks are worth, and their sets.

One operation brings the rows that are due up to date and lists who comes into a set and who goes. It runs beside the
model; the host reads the list two steps later and applies it to its own account (`residency/books.py`).
"""

from dataclasses import dataclass

import torch
from flashmemory_kernels.choose_sets import ChoicePolicy, choose_sets
from flashmemory_kernels.common.due_rows import Due, fill_first_tiles
from flashmemory_kernels.remember_shares import Channels, remember_shares
from flashmemory_kernels.row_lse import row_lse
from flashmemory_kernels.score_rows import score_rows

from flashmemory_vllm.residency.books import HEADER, NOBODY
from flashmemory_vllm.runtime.shape import AttentionShape

# Blocks of one row that a program scores at a time.
TILE = 64


@dataclass(frozen=True, slots=True)
class ChoiceSizes:
    """Sizes of the persistent tensors.

    Attributes:
        num_anchors: A.
        num_groups: G.
        num_places: P, most requests that decode at once.
        width: W, most blocks of a request.
        num_kept: Q, newest queries of each place.
        max_rows: most rows that are due in one step.
        listed: L, most blocks of a row that come in one list, and most that go.
    """

    num_anchors: int
    num_groups: int
    num_places: int
    width: int
    num_kept: int
    max_rows: int
    listed: int


class ChoiceState:
    """Queries, memory and sets by place; touched by one stream, but for the queries, which the model writes.

    Args:
        sizes: of the tensors.
        shape: the model's attention layers.
        groups: layer group of each anchor layer.
        channels: what a block is remembered for.
        weights: of each channel.
        policy: how that becomes worth.

    Attributes:
        queries: model dtype `[A, P, Q, Hq, D]`; that of the token at position i is `[:, place, i % Q]`.
        memory: float32 `[C, G, P, W]`.
        in_set: int8 `[G, P, W]`, the sets with all lists so far applied.
        block_ids: int32 `[P, W]` logical blocks.
    """

    def __init__(
        self,
        sizes: ChoiceSizes,
        shape: AttentionShape,
        groups: tuple[int, ...],
        channels: Channels,
        weights: tuple[float, ...],
        policy: ChoicePolicy,
    ) -> None:
        self.sizes, self._shape, self._channels, self._policy = sizes, shape, channels, policy
        device = shape.device
        by_place = (sizes.num_groups, sizes.num_places, sizes.width)
        kept = (sizes.num_anchors, sizes.num_places, sizes.num_kept, shape.num_query_heads, shape.head_dim)
        self.queries = torch.zeros(kept, dtype=shape.dtype, device=device)
        self.memory = torch.zeros((len(weights), *by_place), device=device)
        self.in_set = torch.zeros(by_place, dtype=torch.int8, device=device)
        self.block_ids = torch.zeros(by_place[1:], dtype=torch.int32, device=device)
        self._groups = torch.tensor(groups, dtype=torch.int32, device=device)
        self._weights = torch.tensor(weights, device=device)
        columns = HEADER + 2 * sizes.listed
        self._list = torch.full((sizes.max_rows, sizes.num_groups, columns), NOBODY, dtype=torch.int32, device=device)

    def remember(self, rows: torch.Tensor, index: torch.Tensor, scales: torch.Tensor | None, num_tiles: int) -> None:
        """Bring the memory of rows up to date with their newest queries.

        Args:
            rows: int32 [n, len(Due)] on the device, prepared by `due_rows`.
            index: [A, N, Hkv, R, E], index keys.
            scales: float32 [A, N, Hkv] of fp8 keys; else None.
            num_tiles: of all rows, as `due_rows` says.
        """
        if num_tiles == 0:
            return
        heads = self.sizes.num_anchors * self._shape.num_query_heads
        mass = torch.empty((num_tiles, heads, self.sizes.num_kept, TILE), device=rows.device)
        lse = torch.empty((len(rows), heads, self.sizes.num_kept), device=rows.device)
        score_rows(self.queries, index, scales, self.block_ids, rows, self._shape.softmax_scale, mass)
        row_lse(mass, rows, lse)
        remember_shares(mass, lse, rows, self._groups, self._channels, self.memory)

    def choose(self, rows: torch.Tensor, long_list: torch.Tensor) -> torch.Tensor:
        """Choose the sets of rows, int32 [n, len(Due)], and list what changes.

        Returns:
            int32 [n, G, 6 + 2 L], a view that the next call overwrites; what does not fit it is in `long_list`.
        """
        listed = self._list[: len(rows)]
        choose_sets(self.memory, self.in_set, rows, self._weights, self._policy, listed, long_list)
        return listed


def due_rows(rows: torch.Tensor) -> int:
    """Fill in where the log-masses of rows, int32 [n, len(Due)] on the host, begin. Returns the tiles of all rows."""
    assert rows.shape[1] == len(Due)
    return fill_first_tiles(rows, TILE)
