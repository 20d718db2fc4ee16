"""Keeps the last token's queries of the anchor layers, where a captured graph can write them."""

from collections.abc import Sequence

import numpy as np
import torch

from flashmemory_vllm.runtime.shape import AttentionShape
from flashmemory_vllm.runtime.uploads import upload


class QueryBuffer:
    """Persistent queries [A, R, Hq, D]; row r is the batch row r of the step that ran last.

    Args:
        num_anchors: A.
        max_rows: most rows of a batch, padding included.
        shape: the model's attention layers.
    """

    def __init__(self, num_anchors: int, max_rows: int, shape: AttentionShape) -> None:
        size = (num_anchors, max_rows, shape.num_query_heads, shape.head_dim)
        self._queries = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        self._last_token = torch.zeros(max_rows, dtype=torch.int64, device=shape.device)
        self._num_rows = 0

    def set_rows(self, num_tokens: Sequence[int]) -> None:
        """Say where each row's last token lies.

        Args:
            num_tokens: scheduled tokens of each batch row, in order.
        """
        self._num_rows = len(num_tokens)
        if max(num_tokens, default=1) == 1:
            return  # each row is its own last token: `capture` needs no table
        last = np.cumsum(np.asarray(num_tokens, dtype=np.int64)) - 1
        self._last_token[: self._num_rows].copy_(upload(last, self._last_token.device))

    def capture(self, anchor: int, query: torch.Tensor, *, one_token_rows: bool) -> None:
        """Copy each row's last query of one anchor layer.

        With one token a row it depends on nothing that the host says in the step, so a captured graph may hold it.

        Args:
            anchor: place of the layer among the anchors.
            query: [T, Hq, D].
            one_token_rows: every row of the batch has one token; rows of padding may follow.
        """
        if one_token_rows:
            rows = min(len(query), self._queries.shape[1])
            self._queries[anchor, :rows].copy_(query[:rows])
        else:
            rows = self._num_rows
            torch.index_select(query, 0, self._last_token[:rows], out=self._queries[anchor, :rows])

    @property
    def all_rows(self) -> torch.Tensor:
        """Queries [A, R, Hq, D], always in the same memory."""
        return self._queries

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """A copy [A, n, Hq, D] of the queries of batch rows, int64 [n] on the device."""
        return self._queries.index_select(1, indices)

    def row(self, index: int) -> torch.Tensor:
        """Queries [A, Hq, D] of one batch row, a view."""
        return self._queries[:, index]
