"""Untrained indexers, whole and damaged."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flashmemory_vllm.indexer.checkpoint import load_indexer, save_indexer
from flashmemory_vllm.indexer.neural_model import IndexerSpec, NeuralIndexer

SPEC = IndexerSpec(
    model="toy",
    num_layers=2,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=16,
    block_size=32,
    chunk_size=8,
    reach=1,
    query_window=2,
    opening_steps=1,
    anchor_layers=(0, 1),
    rank=4,
    num_heads=2,
    dim=8,
    aggregate="max",
    threshold=0.5,
    tau=64,
    delay=1,
    data="0" * 64,
)


def save_untrained(path: Path, **differences: Any) -> Path:
    """Write an indexer with drawn weights.

    Args:
        path: the file.
        differences: what its spec says beside `SPEC`.

    Returns:
        The file.
    """
    model = NeuralIndexer(replace(SPEC, **differences))
    model.init_weights(torch.Generator().manual_seed(0))
    save_indexer(model, path)
    return path


def spoil(path: Path) -> None:
    """Make one of the gate's weights NaN."""
    model = load_indexer(path, torch.device("cpu"))
    model.gate.view(-1)[-1] = float("nan")
    save_indexer(model, path)
