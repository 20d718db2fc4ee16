"""batched_copy: what reaches the driver, with a driver that copies host memory at once."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from flashmemory_vllm.transfer import batched_copy as module
from flashmemory_vllm.transfer.batched_copy import batched_copy, has_batched_copy

STREAM = cast("torch.cuda.Stream", SimpleNamespace(cuda_stream=77))


class Driver:
    """Takes the call as C would."""

    def __init__(self, status: int = 0) -> None:
        self.streams: list[int] = []
        self.status = status
        self.call = module._PROTOTYPE(self._copy)

    def _copy(self, targets: int, sources: int, sizes: int, count: int, *rest: Any) -> int:
        attributes, first, num_attributes, failed, stream = rest
        given = module._Attributes.from_address(attributes)
        assert (given.source_access_order, given.flags, num_attributes) == (1, 1, 1)
        assert ctypes.c_size_t.from_address(first).value == 0
        ctypes.c_size_t.from_address(failed).value = count - 1
        self.streams.append(stream)
        words = ctypes.c_uint64 * count
        for copy in zip(*(words.from_address(array) for array in (targets, sources, sizes)), strict=True):
            ctypes.memmove(*copy)
        return self.status


def install(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    monkeypatch.setattr(module, "_driver_call", lambda: driver.call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_land_where_they_belong_and_nowhere_else(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    driver = Driver()
    install(monkeypatch, driver)
    source, target = torch.randn(9, 30).to(dtype), torch.randn(7, 22).to(dtype)
    source_ids, target_ids = np.array([8, 0, 3], np.int32), np.array([1, 6, 2], np.int32)
    expected = target.clone()
    expected[target_ids, 5:15] = source[source_ids, 20:]
    batched_copy(source[:, 20:], source_ids, target[:, 5:15], target_ids, STREAM)
    assert torch.equal(target, expected)
    assert driver.streams == [77]


def test_nothing_to_copy_calls_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    install(monkeypatch, driver)
    nothing = np.array([], np.int32)
    batched_copy(torch.zeros(1, 2), nothing, torch.zeros(1, 2), nothing, STREAM)
    assert driver.streams == []


def test_the_drivers_refusal_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Driver(status=1))
    ids = np.arange(2)
    with pytest.raises(RuntimeError, match="cuMemcpyBatchAsync: error 1 at copy 1 of 2"):
        batched_copy(torch.zeros(2, 2), ids, torch.zeros(2, 2), ids, STREAM)


def test_a_driver_without_the_call_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_driver_call", lambda: None)
    assert not has_batched_copy()
    with pytest.raises(RuntimeError, match=r"needs a CUDA driver of at least 12\.8"):
        batched_copy(torch.zeros(2, 2), np.arange(2), torch.zeros(2, 2), np.arange(2), STREAM)


@pytest.mark.parametrize(
    ("source", "target", "num_targets", "message"),
    [
        (torch.zeros(4, 96), torch.zeros(4, 64), 2, r"target: expected shape \[\*, 96\], got \[4, 64\]"),
        (torch.zeros(4, 64), torch.zeros(4, 96), 2, r"target: expected shape \[\*, 64\], got \[4, 96\]"),
        (torch.zeros(4, 8), torch.zeros(4, 8).half(), 2, r"target: expected dtype torch.float32, got torch.float16"),
        (torch.zeros(8, 4).T, torch.zeros(4, 8), 2, r"source: expected a last dim of stride 1"),
        (torch.zeros(4, 8), torch.zeros(8, 4).T, 2, r"target: expected a last dim of stride 1"),
        (torch.zeros(4, 8), torch.zeros(4, 8), 3, r"target_ids: expected 2, one for each source, got 3"),
    ],
)
def test_what_would_write_over_the_next_page_is_refused(
    monkeypatch: pytest.MonkeyPatch, source: torch.Tensor, target: torch.Tensor, num_targets: int, message: str
) -> None:
    driver = Driver()
    install(monkeypatch, driver)
    with pytest.raises(ValueError, match=message):
        batched_copy(source, np.arange(2), target, np.arange(num_targets), STREAM)
    assert driver.streams == []
