"""Public op `score_rows`."""

import torch

from flashmemory_kernels.common import expect_contiguous_rows, expect_device, expect_dtype, expect_shape, runs_kernel
from flashmemory_kernels.common.due_rows import Due
from flashmemory_kernels.score_rows.naive import CODE_DTYPE, OnlySets, score_rows_naive

# Fewest blocks of a tile: rows of a product on the tensor cores.
MIN_TILE = 16


def score_rows(  # noqa: PLR0913 - all that a product reads
    queries: torch.Tensor,
    index: torch.Tensor,
    scales: torch.Tensor | None,
    block_ids: torch.Tensor,
    rows: torch.Tensor,
    scale: float,
    mass: torch.Tensor,
    only: OnlySets | None = None,
    *,
    is_checked: bool = False,
) -> None:
    """Log-mass of the blocks of scored rows under their newest queries: `log sum_r exp(scale * q . index[block, r])`.

    The index is what `summarise_keys` makes. With rows twice as wide as a query they are a block's least and largest
    keys, and the product is the bound `sum_d max(q_d least_d, q_d largest_d)`. Rows of fp8 codes stand for their code
    times the scale of their block and head. A log-mass that is not finite counts -inf, so that a broken query gives no
    share to anybody and a broken key none to its block.

    Mutates `mass[first_tile + b // TILE, head, a, b % TILE]` for each block b of a row and each query age a up to its
    number of queries; nothing else of its tiles has a meaning. What rows say is trusted: checking it would stall the
    device.

    Args:
        queries: [A, P, Q, Hq, D]; the query of the token at position i is `queries[:, place, i % Q]`.
        index: [A, N, Hkv, R, E], E = D or 2 D, Hkv divides Hq; rows of one block and head contiguous. Of the queries'
            dtype, or fp8 e4m3.
        scales: float32 [A, N, Hkv] with fp8, rows contiguous; else None.
        block_ids: int32 [P, W], logical blocks of each place by position, rows contiguous.
        rows: int32 [n, len(Due)]; see `common.due_rows`.
        scale: factor on the products.
        mass: float32 [tiles, A * Hq, Qs, TILE], Qs <= Q the most queries of a row; TILE is a power of two, 16 or more.
        only: which blocks gain mass; the others have -inf. Default: all.
        is_checked: an earlier call with such arguments was checked, which takes as long as a launch. Default: False.

    Raises:
        ValueError: shape, dtype, device or strides do not match.
    """
    if not is_checked:
        _expect_index(queries, index, scales)
        _expect_rows(queries, block_ids, rows, mass, only)
    if runs_kernel(queries):
        from flashmemory_kernels.score_rows.kernel import score_rows_triton

        score_rows_triton(queries, index, scales, block_ids, rows, scale, mass, only)
    else:
        score_rows_naive(queries, index, scales, block_ids, rows, scale, mass, only)


def _expect_index(queries: torch.Tensor, index: torch.Tensor, scales: torch.Tensor | None) -> None:
    expect_shape("queries", queries, (None, None, None, None, None))
    num_layers, _, _, num_heads, head_dim = queries.shape
    expect_shape("index", index, (num_layers, None, None, None, None))
    if index.shape[4] not in {head_dim, 2 * head_dim}:
        raise ValueError(f"index: expected rows of {head_dim} or {2 * head_dim} elements, got {index.shape[4]}")
    if num_heads % index.shape[2]:
        raise ValueError(f"index: expected a number of heads that divides {num_heads}, got {index.shape[2]}")
    if index.stride(4) != 1 or (index.shape[3] > 1 and index.stride(3) != index.shape[4]):
        raise ValueError(f"index: expected contiguous rows, got strides {index.stride()}")
    if (index.dtype == CODE_DTYPE) != (scales is not None):
        raise ValueError(f"scales: expected with an index of {CODE_DTYPE} and with no other, got one of {index.dtype}")
    if scales is None:
        expect_dtype("index", index, queries.dtype)
    else:
        expect_shape("scales", scales, tuple(index.shape[:3]))
        expect_dtype("scales", scales, torch.float32)
        expect_device("scales", scales, queries.device)
        expect_contiguous_rows("scales", scales)
    expect_device("index", index, queries.device)
    expect_contiguous_rows("queries", queries)


def _expect_rows(
    queries: torch.Tensor, block_ids: torch.Tensor, rows: torch.Tensor, mass: torch.Tensor, only: OnlySets | None
) -> None:
    num_layers, num_places, num_kept, num_heads, _ = queries.shape
    expect_shape("block_ids", block_ids, (num_places, None))
    expect_shape("rows", rows, (None, len(Due)))
    expect_shape("mass", mass, (None, num_layers * num_heads, None, None))
    _, _, num_queries, tile = mass.shape
    if num_queries > num_kept:
        raise ValueError(f"mass: expected at most {num_kept} queries, got {num_queries}")
    if tile & (tile - 1) or tile < MIN_TILE:
        raise ValueError(f"mass: expected tiles of a power of two from {MIN_TILE} on, got {tile}")
    tensors = [("block_ids", block_ids, torch.int32), ("rows", rows, torch.int32), ("mass", mass, torch.float32)]
    if only is not None:
        expect_shape("in_set", only.in_set, (None, *block_ids.shape))
        expect_shape("groups", only.groups, (num_layers,))
        tensors += [("in_set", only.in_set, torch.int8), ("groups", only.groups, torch.int32)]
    for name, tensor, dtype in tensors:
        expect_dtype(name, tensor, dtype)
        expect_device(name, tensor, queries.device)
        expect_contiguous_rows(name, tensor)
        if name in {"rows", "mass"} and not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
