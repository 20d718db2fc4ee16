"""Public op `summarise_keys`."""

from typing import Literal, get_args

import torch

from flashmemory_kernels.common import expect_contiguous_rows, expect_device, expect_dtype, expect_shape, runs_kernel
from flashmemory_kernels.score_chunks.naive import CODE_DTYPE
from flashmemory_kernels.summarise_keys.naive import summarise_keys_naive

Kind = Literal["bounds", "mean", "exact", "exact_fp8"]


def row_shape(kind: Kind, num_tokens: int, head_dim: int) -> tuple[int, int]:
    """The index rows [R, E] of one block and KV head, for keys [num_tokens, head_dim].

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected one of {list(get_args(Kind))}, got {kind!r}")
    if kind.startswith("exact"):
        return num_tokens, head_dim
    return 1, 2 * head_dim if kind == "bounds" else head_dim


def summarise_keys(
    keys: torch.Tensor,
    slots: torch.Tensor | None,
    index: torch.Tensor,
    block_ids: torch.Tensor,
    kind: Kind,
    scales: torch.Tensor | None = None,
    *,
    is_checked: bool = False,
) -> None:
    """Make the index rows of n full blocks; mutates `index[block_ids]`, and `scales[block_ids]` if there are some.

    A block's row is for "bounds" the minimum of each channel over its tokens, then the maximum (Quest, arXiv
    2406.10774), for "mean" their mean, formed in float32; for "exact" its rows are the keys. For "exact_fp8" they are
    codes that stand for the keys after multiplication with the scale of their block and head, which gives the largest
    key the largest code; with a key that is not a number the scale is none. Ids and slots are trusted: checking them
    would stall the device.

    Args:
        keys: [S, Hkv, T, D], T > 0 tokens of a block, any strides; block i lies in `keys[slots[i]]`.
        slots: int64 [n], or None for 0 .. n-1, with `keys` gathered before: [n, Hkv, T, D].
        index: [N, Hkv, R, E] with (R, E) as `row_shape` says; the rows of one block and KV head contiguous.
        block_ids: int64 [n], distinct.
        kind: how keys become rows.
        scales: float32 [N, Hkv], contiguous, with "exact_fp8", whose index is fp8 e4m3; None with other kinds.
        is_checked: an earlier call with such arguments was checked, which takes as long as a launch. Default: False.

    Raises:
        ValueError: shape, dtype, device or strides do not match, or the kind is unknown.
    """
    if not is_checked:
        _expect(keys, slots, index, block_ids, kind)
        _expect_scales(keys, index, kind, scales)
    if runs_kernel(keys):
        from flashmemory_kernels.summarise_keys.kernel import summarise_keys_triton

        summarise_keys_triton(keys, slots, index, block_ids, kind, scales)
    else:
        summarise_keys_naive(keys, slots, index, block_ids, kind, scales)


def _expect(
    keys: torch.Tensor, slots: torch.Tensor | None, index: torch.Tensor, block_ids: torch.Tensor, kind: Kind
) -> None:
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


def _expect_scales(keys: torch.Tensor, index: torch.Tensor, kind: Kind, scales: torch.Tensor | None) -> None:
    if (kind == "exact_fp8") != (scales is not None):
        raise ValueError(f"scales: expected with the kind 'exact_fp8' and with no other, got the kind {kind!r}")
    if scales is not None:
        expect_shape("scales", scales, tuple(index.shape[:2]))
        expect_dtype("scales", scales, torch.float32)
        expect_dtype("index", index, CODE_DTYPE)
        expect_device("scales", scales, keys.device)
        if not scales.is_contiguous():
            raise ValueError(f"scales: expected a contiguous tensor, got strides {scales.stride()}")
