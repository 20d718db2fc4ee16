"""What every test shares: seeds, order, and skipping what needs a GPU."""

import random
import signal
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

GPU_TESTS = Path(__file__).parent / "gpu"

# How long an example takes says something about the machine, not about the code
settings.register_profile("untimed", parent=settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# Ignored under nohup and in the background of a script: here, and in every process that a test starts and ends by one
for _sign, _usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(_sign) is signal.SIG_IGN:
        signal.signal(_sign, _usual)


def _why_no_gpu() -> str | None:
    """Why GPU tests cannot run here, or None when they can."""
    if find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all of tests/gpu `gpu` and skip it where it cannot run; slow files first: the others fill the gaps."""
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    reason = _why_no_gpu() if gpu_items else None
    for item in gpu_items if reason is not None else ():
        item.add_marker(pytest.mark.skip(reason=f"needs a CUDA device: {reason}"))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Start every test from the same random state."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries draw from this generator
    if find_spec("torch") is not None:
        import torch

        torch.manual_seed(0)
