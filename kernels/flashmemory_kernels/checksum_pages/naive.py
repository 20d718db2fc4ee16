"""Specification and CPU path of `checksum_pages`."""

from collections.abc import Sequence

import torch

# Odd, so that a product with one is undone by no other word; below 2^63, so that they are int64.
PLACE, FIRST, SECOND = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int64 values right, zeros from the left."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def page_sums(pages: torch.Tensor) -> torch.Tensor:
    """Sum pages int32 [n, words] up to int64 [n], modulo 2^64.

    A word `w` at place `i` of its page counts as `mix(w + i * PLACE)`. The mix is SplitMix64's, a permutation of the
    64-bit numbers: two pages that differ in one word always have different sums, others with a chance of 2^-64, and a
    word counts differently at another place. A sum does not depend on the order in which it is formed.
    """
    mixed = pages.to(torch.int64) + torch.arange(pages.shape[1], device=pages.device) * PLACE
    mixed = (mixed ^ _shifted(mixed, 30)) * FIRST
    mixed = (mixed ^ _shifted(mixed, 27)) * SECOND
    return (mixed ^ _shifted(mixed, 31)).sum(-1)


def store_checksums_naive(
    pages: Sequence[torch.Tensor], page_ids: torch.Tensor, sums: torch.Tensor, block_ids: torch.Tensor
) -> None:
    """See `op.store_checksums`."""
    for of_layer, target in zip(pages, sums, strict=True):
        target[block_ids] = page_sums(of_layer[page_ids])


def verify_checksums_naive(
    pages: Sequence[torch.Tensor],
    page_ids: torch.Tensor,
    sums: torch.Tensor,
    block_ids: torch.Tensor,
    wrong: torch.Tensor,
) -> None:
    """See `op.verify_checksums`."""
    for of_layer, expected, target in zip(pages, sums, wrong, strict=True):
        is_wrong = page_sums(of_layer[page_ids]) != expected[block_ids]
        of_layer[page_ids[is_wrong]] = 0
        target.copy_(is_wrong)
