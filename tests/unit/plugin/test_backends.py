"""What the backends put between vLLM and its own attention: each layer group's tables, slots and metadata."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashmemory_vllm.plugin.backends.common import STEP_METADATA, CompactedBuilder, ResidentImpl, StepMetadata


@dataclass(frozen=True)
class Common:
    """As vLLM's `CommonAttentionMetadata`, as far as it is read."""

    num_reqs: int
    block_table_tensor: str
    seq_lens: str
    slot_mapping: str
    max_seq_len: int
    max_query_len: int
    seq_lens_cpu_upper_bound: str = ""


class PlatformBuilder:
    """Gives back what it was given."""

    def build(self, common_prefix_len: int, common_attn_metadata: Common, fast_build: bool = False) -> Any:
        del common_prefix_len, fast_build
        return SimpleNamespace(tables=common_attn_metadata.block_table_tensor, lens=common_attn_metadata.seq_lens)


class PlatformImpl:
    """Notes what it is called with."""

    def __init__(self) -> None:
        self.attended: list[Any] = []
        self.written: list[torch.Tensor] = []

    def forward(self, *args: Any) -> torch.Tensor:
        _, query, _, _, _, metadata, *_ = args
        self.attended.append(metadata)
        assert isinstance(query, torch.Tensor)
        return query

    def do_kv_cache_update(self, *args: Any) -> None:
        self.written.append(args[-1])


class Builder(CompactedBuilder, PlatformBuilder):
    def __init__(self, runtime: Any) -> None:
        layer = SimpleNamespace(impl=SimpleNamespace(runtime=runtime))
        context = {"layer": layer}
        self.vllm_config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=context))
        self.layer_names = ["layer"]


class Impl(ResidentImpl, PlatformImpl):
    pass


class Runtime:
    """Tables and slots are named by what they are."""

    max_rows = 4

    def __init__(self, *, in_step: bool) -> None:
        self.in_step = in_step
        self.layers: list[int] = []

    def compacted_tables(self, num_rows: int) -> list[Any]:
        return [self._table(f"slots {group} of {num_rows}", "short lens") for group in range(2)]

    def physical_tables(self, block_table: str, seq_lens: str, slot_mapping: str, max_seq_len: int) -> list[Any]:
        del slot_mapping, max_seq_len
        return [self._table(block_table, seq_lens) for _ in range(2)]

    def slot_mapping(self, group: int, num_tokens: int) -> torch.Tensor:
        return torch.full((num_tokens,), group)

    def attended(self, layer: int, *_: Any) -> None:
        self.layers.append(layer)

    @staticmethod
    def _table(block_table: str, seq_lens: str) -> Any:
        return SimpleNamespace(block_table=block_table, seq_lens=seq_lens, seq_lens_host="", max_seq_len=1)


@pytest.mark.parametrize(
    ("in_step", "tables", "lens"),
    [(True, ["slots 0 of 3", "slots 1 of 3"], "short lens"), (False, ["blocks", "blocks"], "lens")],
)
def test_metadata_of_a_step_names_slots_and_short_lengths(in_step: bool, tables: list[str], lens: str) -> None:
    """Outside of a step vLLM's own ids are slots already."""
    first = Builder(Runtime(in_step=in_step)).build(0, Common(3, "blocks", "lens", "mapping", 9, 1))
    step: StepMetadata = getattr(first, STEP_METADATA)
    assert step.groups[0] is first
    assert [built.tables for built in step.groups] == tables
    assert {built.lens for built in step.groups} == {lens}


def test_before_there_is_a_runtime_nothing_changes() -> None:
    built = Builder(None).build(0, Common(3, "blocks", "lens", "mapping", 9, 1))
    assert (built.tables, hasattr(built, STEP_METADATA)) == ("blocks", False)


@pytest.mark.parametrize("group", [0, 1])
def test_a_layer_attends_and_writes_with_its_own_group(group: int) -> None:
    impl, runtime = Impl(), Runtime(in_step=True)
    impl.bind(torch.nn.Module(), runtime, 5, group)  # type: ignore[arg-type]
    tokens = torch.zeros(3)
    metadata = SimpleNamespace(**{STEP_METADATA: StepMetadata(["first", "second"])})
    layer: Any = None
    impl.forward(layer, tokens, tokens, tokens, tokens, metadata, tokens)
    impl.do_kv_cache_update(layer, tokens, tokens, tokens, torch.full((3,), 9 if group else 0))
    assert impl.attended == [["first", "second"][group]]
    assert runtime.layers == [5]
    # Group 0's mapping is overwritten where vLLM has it
    assert impl.written[0].tolist() == [group] * 3
