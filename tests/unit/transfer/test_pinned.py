"""Without pinned memory a step goes on with pageable memory; any other fault of the driver is passed on."""

import logging
import re
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from flashmemory_vllm.transfer import pinned as module
from flashmemory_vllm.transfer.pinned import pinned, pinned_like, writable_by_kernels

ROOT = Path(__file__).parents[3]
PINS = re.compile(r"pin_memory\(|pin_memory=True")


def refuse(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    """Let the driver refuse pinned memory."""
    empty = torch.empty

    def fail(*_: object, **__: object) -> NoReturn:
        raise torch.AcceleratorError(message)

    def make(*args: object, pin_memory: bool = False, **kwargs: object) -> torch.Tensor:
        return fail() if pin_memory else empty(*args, **kwargs)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch.Tensor, "pin_memory", fail)
    monkeypatch.setattr(torch, "empty", make)
    module._tell.cache_clear()


def test_a_step_goes_on_without_pinned_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse(monkeypatch, "CUDA error: out of memory\nCompile with ...")
    values = torch.arange(3)
    with caplog.at_level(logging.WARNING, logger="vllm.flashmemory"):
        assert pinned(values) is values
        assert (pinned_like(values).shape, pinned_like(values).dtype) == (values.shape, values.dtype)
        assert writable_by_kernels(values, torch.device("meta")).device.type == "meta"
    assert len(caplog.records) == 1
    assert "(CUDA error: out of memory)" in caplog.records[0].message


def test_a_lost_device_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "CUDA error: an illegal memory access was encountered")
    for ask in (pinned, pinned_like, lambda values: writable_by_kernels(values, torch.device("meta"))):
        with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
            ask(torch.arange(3))


def test_nothing_that_serves_asks_for_pinned_memory_in_another_way() -> None:
    """Of the pool there is none to go on without; what measures and what trains may fail."""
    serving = [ROOT / "flashmemory_vllm" / part for part in ("plugin", "runtime", "transfer", "indexer")]
    asking = {path.name for part in serving for path in part.rglob("*.py") if PINS.search(path.read_text())}
    assert asking == {"pinned.py", "benchmark.py"}
