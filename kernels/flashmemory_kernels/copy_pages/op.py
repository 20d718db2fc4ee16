"""Public op `copy_pages`."""

import torch

from flashmemory_kernels.common import expect_device, expect_dtype, expect_shape
from flashmemory_kernels.copy_pages.naive import copy_pages_naive


def copy_pages(
    source: torch.Tensor,
    source_ids: torch.Tensor | None,
    target: torch.Tensor,
    target_ids: torch.Tensor | None,
) -> None:
    """Copy `target[target_ids[i]] = source[source_ids[i]]`, bit for bit; mutates `target`.

    With `target_ids` None it gathers pages into rows 0 .. n-1 of `target`, with `source_ids` None it scatters
    rows 0 .. n-1 of `source`. Between a pinned host tensor and a GPU tensor the copy runs on the GPU's
    current stream; touching the host side before that stream gets there is the caller's race. Ids are
    trusted: checking them would stall the device.

    Args:
        source: [N, page_elems], rows at any stride, elements of a row contiguous.
        source_ids: int64 [n], or None for 0 .. n-1; at least one of the two is given.
        target: [M, page_elems] of the same dtype, strided likewise; not overlapping `source`.
        target_ids: int64 [n], distinct, or None for 0 .. n-1.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not match, a host tensor next to a GPU tensor is not
            pinned, or the pages of a GPU copy are not whole 32-bit words.
    """
    expect_shape("target", target, (None, source.shape[1]))
    expect_dtype("target", target, source.dtype)
    for name, pages in (("source", source), ("target", target)):
        if pages.shape[1] > 1 and pages.stride(1) != 1:
            raise ValueError(f"{name}: expected contiguous pages (stride 1), got strides {pages.stride()}")
    device = source.device if source.is_cuda else target.device
    _check_ids(source, source_ids, target, target_ids, device)
    if device.type != "cuda":
        copy_pages_naive(source, source_ids, target, target_ids)
        return
    _check_gpu_pages("source", source, device)
    _check_gpu_pages("target", target, device)
    from flashmemory_kernels.copy_pages.kernel import copy_pages_triton

    copy_pages_triton(source, source_ids, target, target_ids)


def _check_ids(
    source: torch.Tensor,
    source_ids: torch.Tensor | None,
    target: torch.Tensor,
    target_ids: torch.Tensor | None,
    device: torch.device,
) -> None:
    num_pages = None
    for name, ids in (("source_ids", source_ids), ("target_ids", target_ids)):
        if ids is not None:
            expect_shape(name, ids, (num_pages,))
            expect_dtype(name, ids, torch.int64)
            expect_device(name, ids, device)
            num_pages = len(ids)
    if num_pages is None:
        raise ValueError("source_ids: expected ids for the source or for the target, got None for both")
    for name, ids, pages in (("source", source_ids, source), ("target", target_ids, target)):
        if ids is None and len(pages) < num_pages:
            raise ValueError(f"{name}: expected at least {num_pages} pages, got {len(pages)}")


def _check_gpu_pages(name: str, pages: torch.Tensor, device: torch.device) -> None:
    if not pages.is_pinned() if pages.device.type == "cpu" else pages.device != device:
        raise ValueError(f"{name}: expected pinned host memory or device {device}, got unpinned or {pages.device}")
    word_bytes = 4
    for what, elems in (
        ("page", pages.shape[1]),
        ("row stride", pages.stride(0)),
        ("start", pages.storage_offset()),
    ):
        if elems * pages.element_size() % word_bytes:
            raise ValueError(
                f"{name}: expected a {what} of whole {word_bytes}-byte words, "
                f"got {elems} elements of {pages.element_size()} bytes"
            )
