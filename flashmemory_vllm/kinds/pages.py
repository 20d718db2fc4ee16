"""What lies inside a page: which elements are keys, which are values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True, slots=True)
class PageFormat(ABC):
    """Reads keys and values out of pages [n, ...page], shaped as vLLM shapes those of its KV cache.

    Attributes:
        num_kv_heads: Hkv.
        block_size: tokens in a page.
        head_dim: D.
        keys_are_views: whether `keys` costs nothing, however many pages there are.
    """

    keys_are_views: ClassVar[bool] = True

    num_kv_heads: int
    block_size: int
    head_dim: int

    def select(self, pages: torch.Tensor, block_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prepare pages, of which few may be meant, for `keys` and `values`.

        Args:
            pages: [P, ...page].
            block_table: int32 [n], the pages that are meant.

        Returns:
            Pages, and the block table that names the same ones among them. None for all of them in order.
        """
        return pages, block_table

    @property
    def value_dim(self) -> int:
        """Dv, elements of a value."""
        return self.head_dim

    @abstractmethod
    def keys(self, pages: torch.Tensor) -> torch.Tensor:
        """The keys of pages [n, ...page] as a view or copy [n, Hkv, block_size, D]."""

    @abstractmethod
    def values(self, pages: torch.Tensor) -> torch.Tensor:
        """The values of pages [n, ...page] as a view or copy [n, Hkv, block_size, Dv]."""


class InterleavedPages(PageFormat):
    """Each token's key and value side by side (vLLM's FlashAttention): [n, Hkv, block_size, 2 * D]."""

    def keys(self, pages: torch.Tensor) -> torch.Tensor:
        """First half of the last dim, a view [n, Hkv, block_size, D]."""
        return pages[..., : self.head_dim]

    def values(self, pages: torch.Tensor) -> torch.Tensor:
        """Second half of the last dim, a view [n, Hkv, block_size, D]."""
        return pages[..., self.head_dim :]


class CpuVectorPages(PageFormat):
    """vLLM's CPU kernels `vec` and `vec16`: per head the keys as [D, block_size], then the values."""

    def keys(self, pages: torch.Tensor) -> torch.Tensor:
        """A transposed view [n, Hkv, block_size, D] of what lies as [n, Hkv, 2, D, block_size]."""
        halves = pages.view(len(pages), self.num_kv_heads, 2, self.head_dim, self.block_size)
        return halves[:, :, 0].transpose(2, 3)

    def values(self, pages: torch.Tensor) -> torch.Tensor:
        """A view [n, Hkv, block_size, D]."""
        return pages.view(len(pages), self.num_kv_heads, 2, self.block_size, self.head_dim)[:, :, 1]


class CpuAmxPages(PageFormat):
    """vLLM's CPU kernel `amx` (bf16): keys and values packed in pairs for the tile instructions.

    Keys of a head lie as [block_size / 16, D / 2, 16 tokens, 2], its values as
    [D / 16, block_size / 2, 16, 2 tokens].
    """

    keys_are_views: ClassVar[bool] = False

    def select(self, pages: torch.Tensor, block_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Only the pages [n, Hkv, block_size, 2 * D] that are meant: `keys` and `values` copy."""
        return pages.index_select(0, block_table), None

    def keys(self, pages: torch.Tensor) -> torch.Tensor:
        """Unpacked, a copy [n, Hkv, block_size, D]."""
        n, heads, tokens, dim = len(pages), self.num_kv_heads, self.block_size, self.head_dim
        packed = pages.view(n, heads, 2, -1)[:, :, 0].view(n, heads, tokens // 16, dim // 2, 16, 2)
        return packed.permute(0, 1, 2, 4, 3, 5).reshape(n, heads, tokens, dim)

    def values(self, pages: torch.Tensor) -> torch.Tensor:
        """Unpacked, a copy [n, Hkv, block_size, D]."""
        n, heads, tokens, dim = len(pages), self.num_kv_heads, self.block_size, self.head_dim
        packed = pages.view(n, heads, 2, -1)[:, :, 1].view(n, heads, dim // 16, tokens // 2, 16, 2)
        return packed.permute(0, 1, 3, 5, 2, 4).reshape(n, heads, tokens, dim)


@dataclass(frozen=True, slots=True)
class LatentPages(PageFormat):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): [n, block_size, D], one key for all heads.

    A key is a latent and, behind it, the part that has a position; the latent is the value as well. Queries are those
    that a model makes for its latents, with the projection of keys absorbed.

    Attributes:
        latent_dim: Dv, elements of the latent.
    """

    latent_dim: int

    @property
    def value_dim(self) -> int:
        """Those of the latent."""
        return self.latent_dim

    def keys(self, pages: torch.Tensor) -> torch.Tensor:
        """All of it, a view [n, 1, block_size, D]."""
        return pages.unsqueeze(1)

    def values(self, pages: torch.Tensor) -> torch.Tensor:
        """The latents, a view [n, 1, block_size, Dv]."""
        return pages[..., : self.latent_dim].unsqueeze(1)
