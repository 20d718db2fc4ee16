"""Triton kernels of `checksum_pages`: a program for each page of each layer, whose words it reads once."""

# A Triton kernel's arguments are pointers and scalars of the traced program: Python has no types for them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202, PLR0913, PLR0917

import torch
import triton
import triton.language as tl

from flashmemory_kernels.checksum_pages.naive import FIRST, PLACE, SECOND

CHUNK_WORDS = 2048
NUM_WARPS = 4


@triton.jit
def _mix(x, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """SplitMix64's finish; the shifts bring in zeros."""
    x = (x ^ (x.to(tl.uint64, bitcast=True) >> 30).to(tl.int64, bitcast=True)) * FIRST
    x = (x ^ (x.to(tl.uint64, bitcast=True) >> 27).to(tl.int64, bitcast=True)) * SECOND
    return x ^ (x.to(tl.uint64, bitcast=True) >> 31).to(tl.int64, bitcast=True)


@triton.jit
def _page_sum(
    p_addresses, i_layer, page, stride_page, num_words,
    PLACE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    p_page = tl.load(p_addresses + i_layer).to(tl.pointer_type(tl.int32)) + page * stride_page
    total = tl.zeros((CHUNK,), tl.int64)
    for start in range(0, num_words, CHUNK):
        i_word = start + tl.arange(0, CHUNK)
        m_word = i_word < num_words
        words = tl.load(p_page + i_word, m_word, other=0).to(tl.int64)
        total += tl.where(m_word, _mix(words + i_word.to(tl.int64) * PLACE, FIRST, SECOND), 0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["num_pages"], do_not_specialize_on_alignment=["p_page_ids", "p_block_ids"])
def store_checksums_kernel(
    p_addresses, p_page_ids, p_sums, p_block_ids, stride_page, stride_sums, num_pages, num_words,
    PLACE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Keep the sum of one page of one layer."""
    i_layer = (tl.program_id(0) // num_pages).to(tl.int64)
    i_page = tl.program_id(0) % num_pages
    page, block = tl.load(p_page_ids + i_page), tl.load(p_block_ids + i_page)
    total = _page_sum(p_addresses, i_layer, page, stride_page, num_words, PLACE, FIRST, SECOND, CHUNK)
    tl.store(p_sums + i_layer * stride_sums + block, total)


@triton.jit(
    do_not_specialize=["num_pages"], do_not_specialize_on_alignment=["p_page_ids", "p_block_ids", "p_sums", "p_wrong"]
)
def verify_checksums_kernel(
    p_addresses, p_page_ids, p_sums, p_block_ids, p_wrong, stride_page, stride_sums, num_pages, num_words,
    PLACE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Compare one page of one layer with its sum; one that is another page becomes zeros."""
    i_layer = (tl.program_id(0) // num_pages).to(tl.int64)
    i_page = tl.program_id(0) % num_pages
    page, block = tl.load(p_page_ids + i_page), tl.load(p_block_ids + i_page)
    total = _page_sum(p_addresses, i_layer, page, stride_page, num_words, PLACE, FIRST, SECOND, CHUNK)
    expected = tl.load(p_sums + i_layer * stride_sums + block)
    tl.store(p_wrong + tl.program_id(0).to(tl.int64), (total != expected).to(tl.uint8))
    if total != expected:
        p_page = tl.load(p_addresses + i_layer).to(tl.pointer_type(tl.int32)) + page * stride_page
        for start in range(0, num_words, CHUNK):
            i_word = start + tl.arange(0, CHUNK)
            tl.store(p_page + i_word, tl.zeros((CHUNK,), tl.int32), i_word < num_words)


def store_checksums_triton(
    addresses: torch.Tensor,
    stride_page: int,
    num_words: int,
    page_ids: torch.Tensor,
    sums: torch.Tensor,
    block_ids: torch.Tensor,
) -> None:
    """See `op.store_checksums`; pages begin at `addresses` int64 [L] and are `stride_page` words apart."""
    num_programs = len(addresses) * len(page_ids)
    if num_programs:
        store_checksums_kernel[(num_programs,)](
            addresses, page_ids, sums, block_ids, stride_page, sums.stride(0), len(page_ids), num_words,
            PLACE=PLACE, FIRST=FIRST, SECOND=SECOND, CHUNK=CHUNK_WORDS, num_warps=NUM_WARPS,
        )  # fmt: skip


def verify_checksums_triton(
    addresses: torch.Tensor,
    stride_page: int,
    num_words: int,
    page_ids: torch.Tensor,
    sums: torch.Tensor,
    block_ids: torch.Tensor,
    wrong: torch.Tensor,
) -> None:
    """See `op.verify_checksums`; pages as in `store_checksums_triton`."""
    num_programs = len(addresses) * len(page_ids)
    if num_programs:
        verify_checksums_kernel[(num_programs,)](
            addresses, page_ids, sums, block_ids, wrong, stride_page, sums.stride(0), len(page_ids), num_words,
            PLACE=PLACE, FIRST=FIRST, SECOND=SECOND, CHUNK=CHUNK_WORDS, num_warps=NUM_WARPS,
        )  # fmt: skip
