"""A page becomes NaN in pinned memory: what the kernel finds on its way back fails that request and no other."""

from pathlib import Path
from typing import Literal

import pytest

from tests.helpers.broken_kv import ask_around_a_broken_block, assert_the_request_failed_alone
from tests.helpers.tiny_model import save_tiny_llama

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.mark.parametrize(("runner", "is_async"), [("v1", False), ("v1", True), ("v2", True)])
def test_a_page_that_changed_in_pinned_memory(runner: Literal["v1", "v2"], is_async: bool, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path, num_layers=2)
    # FlashAttention knows no fp32
    with_graphs = {"enforce_eager": False, "gpu_memory_utilization": 0.1, "dtype": "bfloat16"}
    assert_the_request_failed_alone(ask_around_a_broken_block(tmp_path, "full", runner, is_async, with_graphs))
