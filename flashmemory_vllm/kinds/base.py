"""What pages mean to attention, as far as streamed prefill and selectors ask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from flashmemory_vllm.kinds.pages import PageFormat

Part = tuple[torch.Tensor, torch.Tensor]


class PartialAttention(Protocol):
    """Attention over a part of the keys, as `flashmemory_kernels.partial_attention` specifies it."""

    def __call__(
        self,
        query: torch.Tensor,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        block_table: torch.Tensor | None,
        num_tokens: int,
        scale: float,
        causal: bool,
    ) -> Part:
        """Return out [T, H, Dv] and natural-log lse float32 [H, T]; the caller may overwrite both."""


class Chunk(NamedTuple):
    """A prefill chunk in one layer: T tokens of one request.

    Attributes:
        query: [T, H, D], after RoPE.
        key: [T, Hkv, D].
        value: [T, Hkv, Dv].
        output: [T, H, Dv], where the result goes.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PageKind:
    """What the pages of the managed layers mean to attention.

    Attributes:
        page_format: what lies inside a page.
        scale: factor on `q . k`.
        attend: attention over a part of the keys.
        sinks: by layer the logit [H] that each query has beside those of its keys, of no value. None by default.
    """

    page_format: PageFormat
    scale: float
    attend: PartialAttention
    sinks: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def over_itself(self, layer: int, chunk: Chunk) -> Part:
        """A chunk's attention to its own tokens, and to the layer's sink if it has one."""
        own = chunk.key.unsqueeze(0), chunk.value.unsqueeze(0)
        part = self.attend(chunk.query, *own, None, len(chunk.key), self.scale, True)
        return with_sink(part, self.sinks[layer]) if layer in self.sinks else part

    def over_slots(self, query: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, num_tokens: int) -> Part:
        """Attention to the tokens in some slots of a layer.

        Args:
            query: [T, H, D].
            cache: [S, ...page].
            slots: int32 [n], in the order of the tokens.
            num_tokens: in those slots, of which the last may be partly filled.
        """
        pages, table = self.page_format.select(cache, slots)
        return self._over(query, pages, table, num_tokens)

    def over_pages(self, query: torch.Tensor, pages: torch.Tensor) -> Part:
        """Attention of queries [T, H, D] to all tokens of full pages [n, ...page], in order."""
        return self._over(query, pages, None, len(pages) * self.page_format.block_size)

    def _over(self, query: torch.Tensor, pages: torch.Tensor, table: torch.Tensor | None, num_tokens: int) -> Part:
        keys, values = self.page_format.keys(pages).transpose(1, 2), self.page_format.values(pages).transpose(1, 2)
        return self.attend(query, keys, values, table, num_tokens, self.scale, False)


def with_sink(part: Part, sink: torch.Tensor) -> Part:
    """A part over one key more, of logit `sink` [H] and without a value: float32 [T, H, Dv] and its lse [H, T]."""
    out, lse = part
    total = torch.logaddexp(lse, sink.to(lse).unsqueeze(1))
    return out.float() * (lse - total).exp().T.unsqueeze(-1), total
