"""Recordings of a toy decoder that looks one of its blocks up for some steps, then another."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Toy:
    """Sizes of the toy. One head of the last anchor layer looks blocks up, the others attend to anything.

    The prompt's newest tokens look up what later segments of the answer will.
    """

    documents: int = 24
    prompt_blocks: int = 100
    tokens: int = 48
    segment: int = 12
    block_size: int = 16
    chunk_size: int = 4
    query_window: int = 4
    anchors: int = 2
    num_query_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    per_shard: int = 10
    seed: int = 0


LOOKING_HEAD = 1
FOUND_MASS = 0.7
FOUND_SHARE = 0.75
SMALLEST_MASS = 1e-4


def write_recordings(folder: Path, toy: Toy) -> None:
    """Write a whole data folder."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(toy.seed)
    meta = {
        "format": 4,
        "model": "toy",
        "model_type": "toy",
        "num_layers": 6,
        "num_query_heads": toy.num_query_heads,
        "num_kv_heads": toy.num_kv_heads,
        "head_dim": toy.head_dim,
        "block_size": toy.block_size,
        "chunk_size": toy.chunk_size,
        "query_window": toy.query_window,
        "anchor_layers": [2, 4, 5, 1][: toy.anchors],
        "softmax_scale": toy.head_dim**-0.5,
        "dtype": "float32",
        "window": 64,
        "delay": 1,
        "documents": toy.documents,
        "provenance": {},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    # A channel far off zero in every key, as models with biased keys have
    bias = torch.randn(toy.anchors, toy.num_kv_heads, toy.head_dim, generator=generator) * 3
    shards: list[dict[str, object]] = []
    for first in range(0, toy.documents, toy.per_shard):
        count = min(toy.per_shard, toy.documents - first)
        tensors: dict[str, torch.Tensor] = {}
        for number in range(count):
            document = make_document(toy, bias, generator)
            tensors |= {f"doc{number}.{name}": tensor.contiguous() for name, tensor in document.items()}
        path = folder / f"shard-{len(shards):05d}.safetensors"
        save_file(tensors, path)
        shards.append({"file": path.name, "documents": count, "bytes": path.stat().st_size})
    (folder / "index.json").write_text(json.dumps({"shards": shards}))


def make_document(toy: Toy, bias: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Tensors of one document, by the names of the format."""
    num_prompt = toy.prompt_blocks * toy.block_size
    num_all = num_prompt + toy.tokens
    shape = (toy.anchors, toy.num_kv_heads, num_all, toy.head_dim)
    # Each block has a topic, about which its tokens vary
    topics = torch.randn(*shape[:2], -(-num_all // toy.block_size), toy.head_dim, generator=generator)
    content = topics.repeat_interleave(toy.block_size, 2)[:, :, :num_all] + 0.7 * torch.randn(
        shape, generator=generator
    )
    content *= _slow_channels(toy.head_dim)
    keys = rotate(content * 1.5 + bias.unsqueeze(2), torch.arange(num_all))
    full = num_all // toy.block_size
    chunks = keys[:, :, : full * toy.block_size].reshape(*shape[:2], -1, toy.chunk_size, toy.head_dim)
    pooled = torch.stack((chunks.amax(3), chunks.amin(3), chunks.mean(3)), dim=3)  # [A, Hkv, n * C, 3, D]

    earlier = toy.query_window - 1
    positions = torch.arange(num_prompt - earlier, num_all)
    noise = torch.randn(len(positions), toy.anchors, toy.num_query_heads, toy.head_dim, generator=generator)
    # What the other heads want is louder, and of no use
    queries = 3 * noise * _slow_channels(toy.head_dim)
    num_segments = -(-toy.tokens // toy.segment)
    targets = torch.randint(0, num_prompt, (num_segments,), generator=generator)[
        torch.arange(toy.tokens) // toy.segment
    ]
    asked = targets[torch.arange(earlier, 0, -1) * toy.segment % toy.tokens]
    kv_head = LOOKING_HEAD // (toy.num_query_heads // toy.num_kv_heads)
    queries[:, -1, LOOKING_HEAD] = (
        0.1 * queries[:, -1, LOOKING_HEAD] + 2 * content[-1, kv_head, torch.cat((asked, targets))]
    )
    queries = rotate(queries.movedim(0, 2), positions).movedim(2, 0)

    found = (targets // toy.block_size).tolist()
    mass_ids = [[0, *([block] if block else []), num_prompt // toy.block_size - 1] for block in found]
    # every fourth token looks nothing up, every token pays to the first block
    share_ids = [[0] if token % 4 == 3 else [0, block] if block else [0] for token, block in enumerate(found)]
    # What is looked up is so by an anchor layer, as the prompt's newest tokens do
    seen = torch.zeros(len(positions), num_prompt // toy.block_size)
    of_tokens = torch.cat((asked, targets)) // toy.block_size
    seen[torch.arange(len(positions)), of_tokens] = FOUND_SHARE
    mass = [[0.2, *([FOUND_MASS] if len(ids) > 2 else []), 0.1] for ids in mass_ids]
    return {
        "keys": pooled.transpose(1, 2).half(),
        "queries": queries[earlier:].half(),
        "prompt_queries": queries[:earlier].half(),
        "anchor_share": seen.half(),
        "positions": positions[earlier:].int(),
        **_ragged("share", share_ids),
        "share": torch.full((sum(map(len, share_ids)),), FOUND_SHARE, dtype=torch.float16),
        **_ragged("mass", mass_ids),
        "mass": torch.tensor([value for values in mass for value in values], dtype=torch.float16),
        "group": torch.zeros(1, dtype=torch.int32),
        "answer": torch.tensor([-1, -1], dtype=torch.int32),
    }


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoPE on [..., T, D]."""
    half = x.shape[-1] // 2
    angles = positions.unsqueeze(-1) * 1e7 ** (-torch.arange(half) / half)
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()), dim=-1)


def _slow_channels(head_dim: int) -> torch.Tensor:
    """Content lies where RoPE hardly turns it over a document's length; the rest is position."""
    half = head_dim // 2
    strength = torch.where(torch.arange(half) >= half // 2, 1.0, 0.3)
    return torch.cat((strength, strength))


def _ragged(name: str, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    pointers = np.cumsum([0, *map(len, rows)])
    ids = [entry for row in rows for entry in row]
    return {f"{name}_ptr": torch.from_numpy(pointers).int(), f"{name}_ids": torch.tensor(ids, dtype=torch.int32)}
