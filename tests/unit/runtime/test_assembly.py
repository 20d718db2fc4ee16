"""Staging takes parts of 16K tokens where they are cheap, a small share of the device memory otherwise."""

import pytest
import torch

from flashmemory_vllm.config import FlashMemoryConfig
from flashmemory_vllm.runtime.assembly import plan_staging
from flashmemory_vllm.runtime.shape import AttentionShape

GIB = 1 << 30
# One layer's page of a block is 64 KiB.
SHAPE_8B = AttentionShape(tuple(map(str, range(32))), 32, 8, 128, 1.0, 16, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize(("device_bytes", "blocks"), [(80 * GIB, 1024), (6 * GIB, 1024), (3 * GIB, 512), (1, 1)])
def test_staging_follows_the_device_memory(device_bytes: int, blocks: int) -> None:
    staging = plan_staging(FlashMemoryConfig(), SHAPE_8B, device_bytes)
    assert staging == (blocks, 3 * blocks * (64 << 10))


def test_staging_asked_for_is_taken() -> None:
    assert plan_staging(FlashMemoryConfig(staging_blocks=7), SHAPE_8B, 80 * GIB).blocks == 7
