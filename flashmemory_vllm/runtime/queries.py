"""Keeps the newest queries of each place in the anchor layers, where a captured graph can write them."""

import torch
from flashmemory_kernels.capture_queries import capture_queries

from flashmemory_vllm.runtime.shape import AttentionShape


class QueryRing:
    """Persistent queries [A, P * Q, Hq, D]; that of the token at position i of a request is row `place * Q + i % Q`.

    Args:
        num_anchors: A.
        num_places: P, most requests that have blocks at once.
        num_kept: Q, newest queries that are kept of each.
        shape: the model's attention layers.
    """

    def __init__(self, num_anchors: int, num_places: int, num_kept: int, shape: AttentionShape) -> None:
        size = (num_anchors, num_places * num_kept, shape.num_query_heads, shape.head_dim)
        self._queries = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        self._num_places, self._num_kept = num_places, num_kept

    def capture(self, anchor: int, query: torch.Tensor, query_row: torch.Tensor) -> None:
        """Keep what the tokens of a batch ask for in one anchor layer.

        Nothing here depends on what the host says in the step, so a captured graph may hold it.

        Args:
            anchor: place of the layer among the anchors.
            query: [T, Hq, D].
            query_row: int32 [n] on the device, n <= T: rows of the first n tokens; -1 for those that are not kept.
        """
        capture_queries(query, query_row, self._queries[anchor])

    @property
    def all_rows(self) -> torch.Tensor:
        """Queries [A, P * Q, Hq, D], always in the same memory."""
        return self._queries

    @property
    def by_place(self) -> torch.Tensor:
        """The same as [A, P, Q, Hq, D]."""
        return self._queries.view(-1, self._num_places, self._num_kept, *self._queries.shape[2:])

    def row_of(self, place: int, position: int) -> int:
        """Where the query of the token at a position of its request lies."""
        return place * self._num_kept + position % self._num_kept

    def row(self, index: int) -> torch.Tensor:
        """Queries [A, Hq, D] of one row, a view."""
        return self._queries[:, index]
