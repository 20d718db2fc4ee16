"""Public op `summarise_keys`."""

from typing import Literal, get_args

import torch

from flashmemory_kernels.common import expect_contiguous_rows, expect_device, expect_dtype, expect_shape, runs_kernel
from flashmemory_kernels.summarise_keys.naive import summarise_keys_naive

Kind = Literal["bounds", "mean", "exact"]


def row_shape(kind: Kind, num_tokens: int, head_dim: int) -> tuple[int, int]:
    """The index rows [R, E] of one block and KV head, for keys [num_tokens, head_dim].

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected one of {list(get_args(Kind))}, got {kind!r}")
    return {"bounds": (1, 2 * head_dim), "mean": (1, head_dim), "exact": (num_tokens, head_dim)}[kind]


def summarise_keys(
    keys: torch.Tensor, slots: torch.Tensor | None, index: torch.Tensor, block_ids: torch.Tensor, kind: Kind
) -> None:
    """Make the index rows of n full blocks; mutates `index[block_ids]`.

    A block's row is for "bounds" the minimum of each channel over its tokens, then the maximum (Quest, arXiv
    2406.10774), for "mean" their mean, formed in float32; for "exact" its rows are the keys. Ids and slots are
    trusted: checking them would stall the device.

    Args:
        keys: [S, Hkv, T, D], T > 0 tokens of a block, any strides; block i lies in `keys[slots[i]]`.
        slots: int64 [n], or None for 0 .. n-1, with `keys` gathered before: [n, Hkv, T, D].
        index: [N, Hkv, R, E] with (R, E) as `row_shape` says; the rows of one block and KV head contiguous.
        block_ids: int64 [n], distinct.
        kind: how keys become rows.

    Raises:
        ValueError: shape, dtype, device or strides do not match, or the kind is unknown.
    """
    expect_shape("block_ids", block_ids, (None,))
    expect_shape("keys", keys, (len(block_ids) if slots is None else None, None, None, None))
    _, num_heads, num_tokens, head_dim = keys.shape
    if num_tokens == 0:
        raise ValueError(f"keys: expected at least one token per block, got shape {list(keys.shape)}")
    expect_shape("index", index, (None, num_heads, *row_shape(kind, num_tokens, head_dim)))
    if not index[0, 0].is_contiguous():
        raise ValueError(f"index: expected contiguous rows, got strides {index.stride()}")
    ids = [("block_ids", block_ids)]
    if slots is not None:
        expect_shape("slots", slots, (len(block_ids),))
        ids.append(("slots", slots))
    for name, tensor in ids:
        expect_dtype(name, tensor, torch.int64)
        expect_contiguous_rows(name, tensor)
    for name, tensor in (*ids, ("index", index)):
        expect_device(name, tensor, keys.device)
    if runs_kernel(keys):
        from flashmemory_kernels.summarise_keys.kernel import summarise_keys_triton

        summarise_keys_triton(keys, slots, index, block_ids, kind)
    else:
        summarise_keys_naive(keys, slots, index, block_ids, kind)
