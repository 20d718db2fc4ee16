"""Sizes and steps that follow from options and model: staging, and how often a request is selected for."""

from pathlib import Path

import pytest
import torch

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.runtime.assembly import opening_steps, plan_staging, query_window, tau_steps
from flashmemory_vllm.runtime.shape import AttentionShape
from tests.helpers.indexers import save_untrained

GIB = 1 << 30
# One layer's page of a block is 64 KiB.
SHAPE_8B = AttentionShape(tuple(map(str, range(32))), 32, 8, 128, 1.0, 16, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize(("device_bytes", "blocks"), [(80 * GIB, 1024), (6 * GIB, 1024), (3 * GIB, 512), (1, 1)])
def test_staging_follows_the_device_memory(device_bytes: int, blocks: int) -> None:
    staging = plan_staging(FlashMemoryConfig(), SHAPE_8B, device_bytes)
    assert staging == (blocks, 3 * blocks * (64 << 10))


def test_staging_asked_for_is_taken() -> None:
    assert plan_staging(FlashMemoryConfig(staging_blocks=7), SHAPE_8B, 80 * GIB).blocks == 7


def test_the_question_is_as_long_as_trained_unless_another_is_asked_for(tmp_path: Path) -> None:
    indexer = str(save_untrained(tmp_path / "toy.safetensors", query_window=12))
    assert query_window(FlashMemoryConfig()) == 1
    assert query_window(FlashMemoryConfig(query_window=7)) == 7
    assert query_window(FlashMemoryConfig(indexer=indexer)) == 12
    assert query_window(FlashMemoryConfig(indexer=indexer, query_window=3)) == 3


def test_an_opening_is_as_long_as_trained_unless_another_is_asked_for(tmp_path: Path) -> None:
    indexer = str(save_untrained(tmp_path / "toy.safetensors", opening_steps=3))
    assert opening_steps(FlashMemoryConfig()) == 0
    assert opening_steps(FlashMemoryConfig(opening_steps=4)) == 4
    assert opening_steps(FlashMemoryConfig(indexer=indexer)) == 3
    assert opening_steps(FlashMemoryConfig(indexer=indexer, opening_steps=0)) == 0


def test_tau_is_the_trained_one_unless_another_is_asked_for(tmp_path: Path) -> None:
    indexer = str(save_untrained(tmp_path / "toy.safetensors", tau=48))
    assert tau_steps(FlashMemoryConfig()) == 16
    assert tau_steps(FlashMemoryConfig(indexer=indexer, selection_delay_steps=20)) == 48
    assert tau_steps(FlashMemoryConfig(indexer=indexer, tau_steps=5)) == 5
    with pytest.raises(ConfigError, match=r"selection_delay_steps is 49: .*tau_steps, which is 48"):
        tau_steps(FlashMemoryConfig(indexer=indexer, selection_delay_steps=49))
