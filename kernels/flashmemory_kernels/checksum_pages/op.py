"""Public ops `store_checksums` and `verify_checksums`."""

from collections.abc import Sequence

import torch

from flashmemory_kernels.checksum_pages.naive import store_checksums_naive, verify_checksums_naive
from flashmemory_kernels.common import expect_contiguous_rows, expect_device, expect_dtype, expect_shape, runs_kernel

WORD_BYTES = 4


class PageSet:
    """The pages of L layers that lie equally far apart, so that one kernel reads them all.

    Args:
        pages: per layer [P, page_elems] of one dtype and shape, rows at any stride, elements of a row contiguous. The
            memory must stay where it is.

    Raises:
        ValueError: there is no layer, layers differ, or a page is not made of whole 32-bit words.
    """

    def __init__(self, pages: Sequence[torch.Tensor]) -> None:
        if not pages:
            raise ValueError("pages: expected the pages of at least one layer, got none")
        first = pages[0]
        for layer, given in enumerate(pages):
            name = f"pages[{layer}]"
            expect_shape(name, given, (first.shape[0], first.shape[1]))
            expect_dtype(name, given, first.dtype)
            expect_device(name, given, first.device)
            expect_contiguous_rows(name, given)
            for what, elems in (("page", given.shape[1]), ("row stride", given.stride(0))):
                if elems * given.element_size() % WORD_BYTES:
                    raise ValueError(
                        f"{name}: expected a {what} of whole {WORD_BYTES}-byte words, "
                        f"got {elems} elements of {given.element_size()} bytes"
                    )
            if given.stride(0) != first.stride(0):
                raise ValueError(f"{name}: expected rows {first.stride(0)} elements apart, got {given.stride(0)}")
        self.words = [given.view(torch.int32) for given in pages]
        self.addresses = torch.tensor([given.data_ptr() for given in pages], device=first.device)
        self.stride_words = self.words[0].stride(0)
        self.num_words = self.words[0].shape[1]

    def __len__(self) -> int:
        return len(self.words)


def store_checksums(pages: PageSet, page_ids: torch.Tensor, sums: torch.Tensor, block_ids: torch.Tensor) -> None:
    """Keep the sums of n pages of each layer, `naive.page_sums`; mutates `sums[:, block_ids]`.

    Ids are trusted: checking them would stall the device.

    Args:
        pages: of L layers.
        page_ids: int64 [n], places of the pages.
        sums: int64 [L, N], rows at any stride.
        block_ids: int64 [n], distinct, whose content the pages are.

    Raises:
        ValueError: shape, dtype, device or strides do not match.
    """
    _expect(pages, page_ids, sums, block_ids)
    if runs_kernel(sums):
        from flashmemory_kernels.checksum_pages.kernel import store_checksums_triton

        store_checksums_triton(pages.addresses, pages.stride_words, pages.num_words, page_ids, sums, block_ids)
    else:
        store_checksums_naive(pages.words, page_ids, sums, block_ids)


def verify_checksums(
    pages: PageSet, page_ids: torch.Tensor, sums: torch.Tensor, block_ids: torch.Tensor, wrong: torch.Tensor
) -> None:
    """Compare n pages of each layer with the sums that were kept; writes all of `wrong`.

    A page that is another one is filled with zeros: what a step computes from it before anybody knows is of no use, but
    it must not be NaN, for which a sampler may take a token that no vocabulary has.

    Args:
        pages: of L layers.
        page_ids: int64 [n], places of the pages, distinct.
        sums: int64 [L, N], from `store_checksums`, rows at any stride.
        block_ids: int64 [n], whose content the pages should be.
        wrong: uint8 [L, n], contiguous, pinned or where the pages are: 1 where a page is another one, else 0.

    Raises:
        ValueError: shape, dtype, device or strides do not match.
    """
    _expect(pages, page_ids, sums, block_ids)
    expect_shape("wrong", wrong, (len(pages), len(page_ids)))
    expect_dtype("wrong", wrong, torch.uint8)
    if not wrong.is_contiguous():
        raise ValueError(f"wrong: expected a contiguous tensor, got strides {wrong.stride()}")
    if runs_kernel(sums):
        from flashmemory_kernels.checksum_pages.kernel import verify_checksums_triton

        verify_checksums_triton(pages.addresses, pages.stride_words, pages.num_words, page_ids, sums, block_ids, wrong)
    else:
        verify_checksums_naive(pages.words, page_ids, sums, block_ids, wrong)


def _expect(pages: PageSet, page_ids: torch.Tensor, sums: torch.Tensor, block_ids: torch.Tensor) -> None:
    expect_shape("page_ids", page_ids, (None,))
    expect_shape("block_ids", block_ids, (len(page_ids),))
    expect_shape("sums", sums, (len(pages), None))
    expect_contiguous_rows("sums", sums)
    for name, tensor in (("page_ids", page_ids), ("block_ids", block_ids), ("sums", sums)):
        expect_dtype(name, tensor, torch.int64)
        expect_device(name, tensor, pages.addresses.device)
