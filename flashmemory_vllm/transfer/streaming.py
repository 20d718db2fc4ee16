"""Dense prefill attention over a history that is not on the device: streamed in, merged by log-sum-exp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from flashmemory_kernels.copy_pages import copy_pages
from flashmemory_kernels.merge_attention import merge_attention
from flashmemory_kernels.partial_attention import partial_attention

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.transfer.engine import TransferEngine
from flashmemory_vllm.transfer.page_format import PageFormat


class HistorySource(Protocol):
    """The earlier tokens of one request in one layer, as pages that can be fetched."""

    @property
    def num_tokens(self) -> int:
        """History tokens; the last block may be partly filled."""

    @property
    def block_size(self) -> int:
        """Tokens in a block."""

    def fetch(self, start: int, count: int, out: torch.Tensor) -> None:
        """Begin to copy the pages of `count` history blocks from `start` on to `out` [count, page_elems]."""

    def wait(self) -> None:
        """Make the attention enqueued next wait for what was fetched."""

    def keys_values(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Read fetched pages [n, page_elems] as keys and values, each [n * block_size, Hkv, D]."""


class PartialAttention(Protocol):
    """Attention over a part of the keys, as `flashmemory_kernels.partial_attention` specifies it."""

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out [T, H, D] and natural-log lse float32 [H, T]."""


@dataclass(frozen=True, slots=True, eq=False)
class PagedHistory:
    """History of one request in one layer: blocks from the host, then blocks from their device slots.

    Attributes:
        engine: moves the pages.
        page_format: what lies inside a page.
        layer: attention layer.
        block_ids: int64 [n] on the device, full blocks to read from the host.
        num_tokens: history tokens of host and device blocks together.
        device_slots: int64 [m] on the device, slots of the blocks without a host copy: full ones that another
            row writes in this step, and last the partial tail. Default: None, there are none.

    Raises:
        IntegrityError: the blocks do not hold `num_tokens`, or the partial tail would come from the host.
    """

    engine: TransferEngine
    page_format: PageFormat
    layer: int
    block_ids: torch.Tensor
    num_tokens: int
    device_slots: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse a history whose pages do not hold its tokens."""
        num_host, num_device = len(self.block_ids), 0 if self.device_slots is None else len(self.device_slots)
        num_full, num_tail = divmod(self.num_tokens, self.block_size)
        if num_host + num_device != num_full + (num_tail > 0) or num_host > num_full:
            raise IntegrityError(
                f"a history of {self.num_tokens} tokens has {num_full} full blocks of {self.block_size} and "
                f"{num_tail} more tokens, which are on the device; got {num_host} host and {num_device} "
                "device blocks"
            )

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.page_format.block_size

    def fetch(self, start: int, count: int, out: torch.Tensor) -> None:
        """Begin to copy pages of history blocks to `out`."""
        block_ids = self.block_ids[start : start + count]
        self.engine.gather_layer(self.layer, block_ids, out)
        if self.device_slots is not None and len(block_ids) < count:
            first = max(0, start - len(self.block_ids))
            slots = self.device_slots[first : first + count - len(block_ids)]
            copy_pages(self.engine.layout.page_view(self.layer), slots, out[len(block_ids) :], None)

    def wait(self) -> None:
        """Order the attention enqueued next after the fetched copies."""
        self.engine.wait_gathers()

    def keys_values(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Read fetched pages as keys and values [n * block_size, Hkv, D]; views where the format allows."""
        shaped = self.engine.layout.unflatten(self.layer, pages)
        fmt = self.page_format
        rows = (len(pages) * fmt.block_size, fmt.num_kv_heads, fmt.head_dim)
        return (
            fmt.keys(shaped).transpose(1, 2).reshape(rows),
            fmt.values(shaped).transpose(1, 2).reshape(rows),
        )


def stream_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    history: HistorySource,
    scale: float,
    staging: tuple[torch.Tensor, torch.Tensor],
    attend: PartialAttention = partial_attention,
) -> torch.Tensor:
    """Attend a prefill chunk to itself (causal) and to all earlier tokens of its request.

    The next pages are fetched into one staging buffer while the device attends to the other; the parts are
    merged by their log-sum-exp, so the result is dense attention, exact up to rounding.

    Args:
        query: [T, H, D], the chunk's queries after RoPE.
        key: [T, Hkv, D], the chunk's own keys.
        value: [T, Hkv, D], the chunk's own values.
        history: the earlier tokens; may be empty.
        scale: factor on `q . k`.
        staging: two buffers [staging_blocks, page_elems] in the cache dtype; overwritten.
        attend: attention over a part of the keys. Default: the portable op.

    Returns:
        [T, H, D] in the dtype of `query`.
    """
    staging_blocks = len(staging[0])
    num_blocks = -(-history.num_tokens // history.block_size)

    def fetch(start: int) -> torch.Tensor:
        count = min(staging_blocks, num_blocks - start)
        pages = staging[start // staging_blocks % 2][:count]
        history.fetch(start, count, pages)
        return pages

    ahead = fetch(0) if num_blocks else None
    out, lse = attend(query, key, value, scale, True)
    # Each merge rounds once: the running result stays in float32.
    out = out.float()
    for start in range(0, num_blocks, staging_blocks):
        assert ahead is not None
        pages = ahead
        history.wait()
        # After the wait, so that attention is not held up by the pages after next; before the attention, so
        # that the copy runs beside it. The buffer's last reader, one round ago, is enqueued already.
        if start + staging_blocks < num_blocks:
            ahead = fetch(start + staging_blocks)
        past_key, past_value = history.keys_values(pages)
        num_tokens = min(history.num_tokens - start * history.block_size, len(past_key))
        part, part_lse = attend(query, past_key[:num_tokens], past_value[:num_tokens], scale, False)
        out, lse = merge_attention(out, lse, part, part_lse)
    return out.to(query.dtype)
