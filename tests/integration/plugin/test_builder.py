"""Metadata of a batch that the runtime's tables cannot hold."""

from types import SimpleNamespace
from typing import Any

import pytest

from flashmemory_vllm.errors import IntegrityError
from flashmemory_vllm.plugin.backends.common import CompactedBuilder


class Stock:
    """Stands for the platform's builder."""

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> str:  # noqa: ARG002
        return "stock metadata"


class Builder(CompactedBuilder, Stock):
    """Ours, of an engine whose runtime has tables of four rows."""

    def __init__(self, *, in_step: bool) -> None:
        runtime = SimpleNamespace(in_step=in_step, max_rows=4)
        layers = {"0": SimpleNamespace(impl=SimpleNamespace(runtime=runtime))}
        compilation: Any = SimpleNamespace(static_forward_context=layers)
        self.vllm_config: Any = SimpleNamespace(compilation_config=compilation)
        self.layer_names = ["0"]


def test_logical_ids_of_a_step_never_reach_the_device() -> None:
    with pytest.raises(IntegrityError, match=r"a step has 5 rows, allowed are .*: 4"):
        Builder(in_step=True).build(0, SimpleNamespace(num_reqs=5))


def test_outside_of_a_step_ids_are_slots_and_pass() -> None:
    assert Builder(in_step=False).build(0, SimpleNamespace(num_reqs=5)) == "stock metadata"
