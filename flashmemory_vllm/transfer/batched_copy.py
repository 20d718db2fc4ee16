"""Page copies by the GPU's copy engines: one call of the CUDA driver for any number of pages."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch
from flashmemory_kernels.common import expect_contiguous_rows, expect_dtype, expect_shape

from flashmemory_vllm.transfer.engine import Ids

# The driver's version, as cuGetProcAddress counts, whose form of the call is used here.
_CUDA_12_8 = 12080
# The source is read in the order of the stream: an earlier copy of the stream, or one it waits for, wrote it.
_SOURCE_IN_STREAM_ORDER = 1
_OVERLAP_WITH_COMPUTE = 1


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes; the location hints matter for managed memory only."""

    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_hint", _Location),
        ("target_hint", _Location),
        ("flags", ctypes.c_uint),
    )


_ATTRIBUTES = _Attributes(source_access_order=_SOURCE_IN_STREAM_ORDER, flags=_OVERLAP_WITH_COMPUTE)
# Index of the first copy that the attributes are for.
_FIRST = ctypes.c_size_t(0)
# targets, sources, sizes, count, attributes, first copy of each, number of attributes, failed copy, stream
_PROTOTYPE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_void_p,
)


def has_batched_copy() -> bool:
    """Whether the CUDA driver has the call (12.8 and later)."""
    return _driver_call() is not None


def batched_copy(
    source: torch.Tensor, source_ids: Ids, target: torch.Tensor, target_ids: Ids, stream: torch.cuda.Stream
) -> None:
    """Copy `target[target_ids[i]] = source[source_ids[i]]` on a stream, bit for bit, without a kernel.

    Args:
        source: [N, page_elems] on the GPU or pinned, rows at any stride, elements of a row contiguous.
        source_ids: [n] on the host.
        target: [M, page_elems] likewise, of the same dtype; not overlapping `source`.
        target_ids: [n] on the host, distinct.
        stream: any but the default stream, which the driver refuses.

    Raises:
        ValueError: pages differ in width or dtype, are not contiguous, or there are not as many targets as sources:
            the driver, which sees addresses only, would write over the next page.
        RuntimeError: the driver lacks the call or refuses the copies.
    """
    expect_shape("target", target, (None, source.shape[1]))
    expect_dtype("target", target, source.dtype)
    expect_contiguous_rows("source", source)
    expect_contiguous_rows("target", target)
    if len(source_ids) != len(target_ids):
        raise ValueError(f"target_ids: expected {len(source_ids)}, one for each source, got {len(target_ids)}")
    call = _driver_call()
    if call is None:
        raise RuntimeError("cuMemcpyBatchAsync: needs a CUDA driver of at least 12.8; use copy_pages")
    count = len(source_ids)
    if count == 0:
        return
    sources, targets = page_addresses(source, source_ids), page_addresses(target, target_ids)
    sizes = np.full(count, source.shape[1] * source.element_size(), np.uint64)
    failed = ctypes.c_size_t(0)
    status = call(
        targets.ctypes.data,
        sources.ctypes.data,
        sizes.ctypes.data,
        count,
        ctypes.addressof(_ATTRIBUTES),
        ctypes.addressof(_FIRST),
        1,
        ctypes.addressof(failed),
        stream.cuda_stream,
    )
    if status != 0:
        raise RuntimeError(f"cuMemcpyBatchAsync: error {status} at copy {failed.value} of {count}")


def page_addresses(pages: torch.Tensor, ids: Ids) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Where pages begin in memory, uint64 [n]."""
    row_bytes = pages.stride(0) * pages.element_size()
    return ids.astype(np.uint64) * np.uint64(row_bytes) + np.uint64(pages.data_ptr())


@cache
def _driver_call() -> Any:  # noqa: ANN401 - a C function
    try:
        look_up = ctypes.CDLL("libcuda.so.1").cuGetProcAddress_v2
    except (OSError, AttributeError):
        # No driver, or one older than 12.0.
        return None
    address, found = ctypes.c_void_p(), ctypes.c_int(0)
    status = look_up(b"cuMemcpyBatchAsync", ctypes.byref(address), _CUDA_12_8, ctypes.c_uint64(0), ctypes.byref(found))
    return _PROTOTYPE(address.value) if status == 0 and address.value else None
