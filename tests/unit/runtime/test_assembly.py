"""A runtime is built with the options in force: those given, and what suits the selector for the rest."""

import errno
from pathlib import Path

import pytest
import torch
from flashmemory_kernels.choose_sets import ChoicePolicy
from flashmemory_kernels.remember_shares import Channel

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.indexer.places import MemoryKind
from flashmemory_vllm.residency.books import Books
from flashmemory_vllm.residency.quick import compiled
from flashmemory_vllm.residency.quick.books import QuickBooks
from flashmemory_vllm.residency.quick.compiled import IS_COMPILED
from flashmemory_vllm.runtime.assembly import unallocated_selector
from flashmemory_vllm.runtime.beside import index_bytes_per_block
from flashmemory_vllm.runtime.quick_choice import QuickChoice
from flashmemory_vllm.runtime.shape import AttentionShape
from tests.unit.runtime.driven import DrivenRuntime

SHAPE_8B = AttentionShape(tuple(map(str, range(32))), 32, 8, 128, 1.0, 16, torch.bfloat16, torch.device("cpu"))


def test_the_default_remembers_and_keeps_keys_of_a_byte() -> None:
    selector = unallocated_selector(FlashMemoryConfig(), SHAPE_8B)
    channels = (Channel(0.9, "max", "max"), Channel(1.0, "max", "rms"))
    assert selector.memory_kind == MemoryKind(channels, (1.0, 0.3), "sum", num_queries=0)
    assert index_bytes_per_block(FlashMemoryConfig(), SHAPE_8B) == 3 * 8 * (16 * 128 + 4)


def test_what_is_given_replaces_what_suits_the_selector() -> None:
    config = FlashMemoryConfig(memory_decay=0.0, question_share=0.0, index_dtype="auto")
    assert unallocated_selector(config, SHAPE_8B).memory_kind == MemoryKind((Channel(0.0),))
    assert index_bytes_per_block(config, SHAPE_8B) == 3 * 8 * 16 * 128 * 2


def test_a_choice_is_made_with_them(tmp_path: Path) -> None:
    shapes = []
    worlds: list[dict[str, object]] = [{"selector": "exact"}, {"selector": "exact", "hysteresis": 0.25}, {}]
    for number, options in enumerate(worlds):
        choices = DrivenRuntime(tmp_path / str(number), options).runtime._parts.choices
        shapes.append((choices._state._policy, choices._state.places.queries.shape[2]))
    # Every other step: with a memory the queries of two tokens and the running one's, in sums of two channels
    assert shapes == [
        (ChoicePolicy("sum", 0.5, 1.0, 0.0), 3),
        (ChoicePolicy("sum", 0.5, 0.25, 0.0), 3),
        (ChoicePolicy("max", 0.0, 0.0, 0.0), 2),
    ]


def broken(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("is_there", [True, False])
def test_without_loops_a_runtime_does_the_same(
    is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Numba is not there, or cannot write down what it has compiled."""
    outputs = []
    for number in range(2):
        driven = DrivenRuntime(tmp_path / str(number))
        driven.prefill("a", 12)
        outputs.append(driven.decode("a", 30))
        assert (type(driven.runtime.parts.planner._books) is Books) == (number == 1 or not IS_COMPILED)
        monkeypatch.setattr(compiled, "IS_COMPILED", is_there)
        monkeypatch.setattr(QuickBooks, "__init__", broken)
        monkeypatch.setattr(QuickChoice, "__init__", broken)
    assert all((one == other).all() for one, other in zip(*outputs, strict=True))
    assert ("loops cannot be compiled" in caplog.text) == is_there
