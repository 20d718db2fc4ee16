"""Reads recorded attention: a folder of shards, each of whole documents, and what each document tells a trainer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.history import replay
from flashmemory_vllm.training.ragged import FloatArray, IntArray, Ragged

FORMAT = 4
META_NAME = "meta.json"
INDEX_NAME = "index.json"


@dataclass(frozen=True, slots=True)
class DataMeta:
    """What all documents of a folder have in common; fields as in `meta.json`.

    Attributes:
        model: name of the recorded model.
        num_layers: its attention layers.
        num_query_heads: its query heads, Hq.
        num_kv_heads: its KV heads, Hkv.
        head_dim: elements of one key, D.
        block_size: tokens in a block.
        chunk_size: tokens in a chunk, over which keys were pooled.
        query_window: newest tokens of a prompt whose queries were recorded, the last one among them.
        anchor_layers: layers whose queries and keys were recorded (A of them).
        softmax_scale: factor on `q . k` in its attention.
        delay: steps from a query to the step before its selection is in force.
        documents: number of documents in all shards.
        digest: SHA-256 of the file.
    """

    model: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    chunk_size: int
    query_window: int
    anchor_layers: tuple[int, ...]
    softmax_scale: float
    delay: int
    documents: int
    digest: str


@dataclass(frozen=True, slots=True)
class Schedule:
    """When serving selects, and for how long.

    Attributes:
        tau: steps for which a selection is in force.
        delay: steps from a query to the step before its selection is in force; none for the first ones.
        opening_steps: decode steps after the prompt that each end with a selection that is in force in the next one.
    """

    tau: int
    delay: int
    opening_steps: int = 0


class Document:
    """One recorded document; large tensors stay in the file until rows of them are asked for.

    Attributes:
        block_size: tokens in a block.
        chunks_per_block: chunks in a block, C.
        positions: int64 [T], token index of each recorded token, ascending; the first is the prompt's last.
        share: largest share of any head's attention that each token pays to blocks.
        mass: attention mass of each token's blocks.
        keys: float16 [A, n_blocks * C, Hkv, 3, D].
        queries: float16 [T, A, Hq, D].
        prompt_queries: float16 [w, A, Hq, D], of the prompt's newest tokens before its last.
        anchor_share: float16 [w + T, N], largest share that any head of the anchor layers pays to each full block, of
            what it pays to full blocks: of the same tokens, then of the recorded ones.
        answer: first recorded token that writes the answer; -1 if it is not known.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], block_size: int, chunk_size: int) -> None:
        self.block_size, self.chunks_per_block = block_size, block_size // chunk_size
        self.keys, self.queries, self.prompt_queries = (tensors[n] for n in ("keys", "queries", "prompt_queries"))
        self.anchor_share = tensors["anchor_share"]
        self.positions: IntArray = _integers(tensors["positions"])
        self.share, self.mass = (_ragged(tensors, name) for name in ("share", "mass"))
        self.answer = int(tensors["answer"][0])

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def num_blocks(self) -> int:
        """Full blocks of the document."""
        return self.keys.shape[1] // self.chunks_per_block

    def num_candidates(self, token: int) -> int:
        """Blocks that are full when this recorded token asks."""
        return int(self.positions[token]) // self.block_size

    def windows(self, schedule: Schedule) -> tuple[IntArray, IntArray]:
        """Recorded tokens `[first, end)` that the selection at each recorded token is for, int64 [T] each.

        A first selection is for all of the answer, and whatever precedes that is not its business: what it finds is
        remembered until then. A later one is for the steps in which it is in force.
        """
        steps = self.positions - self.positions[0]
        start = self.positions + 1 + np.where(steps <= schedule.opening_steps, 0, schedule.delay)
        first, end = (np.searchsorted(self.positions, at) for at in (start, start + schedule.tau))
        first[0], end[0] = max(1, self.answer), max(2, len(self))
        return first, end

    def largest_shares(self, token: int, schedule: Schedule) -> FloatArray:
        """Largest share [num_candidates] that any head pays each candidate in any token that the selection is for."""
        first, end = (int(bounds[token]) for bounds in self.windows(schedule))
        return self.share.maxima(first, max(first, min(end, len(self))), self.num_candidates(token))

    def question(self, window: int) -> torch.Tensor:
        """Queries [window, A, Hq, D] of the prompt's newest tokens, the last one last; a short prompt repeats it."""
        last = self.queries[:1]
        earlier = self.prompt_queries[max(0, len(self.prompt_queries) - window + 1) :] if window > 1 else last[:0]
        return torch.cat((earlier, last.expand(window - len(earlier), *last.shape[1:])))

    def memory(self, window: int, decays: Sequence[float]) -> torch.Tensor:
        """What is remembered of blocks after each recorded token, of the question and of what follows.

        Args:
            window: tokens of the question.
            decays: of the channels.

        Returns:
            float32 [T, C, N], N as many as there are full blocks or more.
        """
        earlier = min(len(self.prompt_queries), window - 1)
        first = len(self.prompt_queries) - earlier
        before = np.arange(-earlier, 0) + self.positions[0]
        missing = max(0, self.num_blocks - self.anchor_share.shape[1])
        shares = torch.nn.functional.pad(self.anchor_share[first:], (0, missing))
        return replay(shares, np.concatenate((before, self.positions)), decays)[earlier:]

    def question_blocks(self, window: int) -> slice:
        """Blocks that the prompt's newest tokens lie in, which serving keeps."""
        prompt_len = int(self.positions[0]) + 1
        return slice(max(0, prompt_len - window) // self.block_size, -(-prompt_len // self.block_size))

    def chunks(self, blocks: torch.Tensor, reach: int) -> torch.Tensor:
        """Pooled keys of blocks, float16 [M, reach + C, A, Hkv, 3, D].

        Args:
            blocks: int64 [M].
            reach: chunks before each block that come first; the first block repeats its own first one.
        """
        rows = blocks.unsqueeze(1) * self.chunks_per_block + torch.arange(-reach, self.chunks_per_block)
        return self.keys[:, rows.clamp(min=0)].movedim(0, 2)


class TrainingData:
    """A complete folder of recordings.

    Args:
        folder: with `meta.json`, `index.json` and shards.

    Raises:
        ConfigError: the folder is incomplete, of another format, or a shard does not hold what the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = _read_meta(folder)
        self._places: list[tuple[Path, int]] = []
        for shard in _read_json(folder / INDEX_NAME)["shards"]:
            path = folder / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise ConfigError(
                    f"--data: {path} is missing or has not the {shard['bytes']} bytes that the index says"
                )
            self._places += [(path, number) for number in range(shard["documents"])]
        if len(self._places) != self.meta.documents:
            raise ConfigError(
                f"--data: {folder} has {len(self._places)} documents, its meta says {self.meta.documents}"
            )

    def __len__(self) -> int:
        return len(self._places)

    def load(self, number: int) -> Document:
        """Open one document; safetensors maps its file, so that only what is read takes memory.

        Raises:
            ConfigError: a tensor is missing or does not have the shape that the meta says.
        """
        path, place = self._places[number]
        ragged = ("share_ptr", "share_ids", "share", "mass_ptr", "mass_ids", "mass")
        names = ("keys", "queries", "prompt_queries", "anchor_share", "positions", "answer", *ragged)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(f"doc{place}.{name}") for name in names}
        except SafetensorError as error:
            raise ConfigError(f"--data: document {place} of {path} cannot be read: {error}") from error
        self._check(tensors, f"document {place} of {path}")
        return Document(tensors, self.meta.block_size, self.meta.chunk_size)

    def _check(self, tensors: dict[str, torch.Tensor], where: str) -> None:
        meta, num_tokens = self.meta, len(tensors["positions"])
        anchors = len(meta.anchor_layers)
        num_chunks = tensors["keys"].shape[1] if tensors["keys"].dim() > 1 else 0
        one = (anchors, meta.num_query_heads, meta.head_dim)
        wanted = {
            "keys": (anchors, num_chunks, meta.num_kv_heads, 3, meta.head_dim),
            "queries": (num_tokens, *one),
            "prompt_queries": (len(tensors["prompt_queries"]), *one),
            "anchor_share": (len(tensors["prompt_queries"]) + num_tokens, tensors["anchor_share"].shape[-1]),
            "answer": (2,),
            "share_ptr": (num_tokens + 1,),
            "share": tuple(tensors["share_ids"].shape),
            "mass_ptr": (num_tokens + 1,),
            "mass": tuple(tensors["mass_ids"].shape),
        }
        for name, shape in wanted.items():
            if tuple(tensors[name].shape) != shape:
                raise ConfigError(f"--data: {where}: {name} is {list(tensors[name].shape)}, expected {list(shape)}")
        num_blocks = num_chunks * meta.chunk_size // meta.block_size
        if not num_tokens or int(tensors["positions"].max()) // meta.block_size > num_blocks:
            raise ConfigError(f"--data: {where}: has {num_blocks} blocks, fewer than its positions tell")


def split_documents(num_documents: int, validation_share: float, seed: int) -> tuple[Sequence[int], Sequence[int]]:
    """Documents to train on and to validate on, drawn from the seed; at least one of each.

    Raises:
        ConfigError: there are fewer than two documents.
    """
    if num_documents < 2:
        raise ConfigError(f"--data has {num_documents} documents: allowed is 2 or more, one of them to validate on")
    order = np.random.default_rng(seed).permutation(num_documents).tolist()
    num_validation = min(max(1, round(validation_share * num_documents)), num_documents - 1)
    return sorted(order[num_validation:]), sorted(order[:num_validation])


def _ragged(tensors: dict[str, torch.Tensor], name: str) -> Ragged:
    pointers, ids = (_integers(tensors[f"{name}_{part}"]) for part in ("ptr", "ids"))
    return Ragged(pointers, ids, tensors[name].numpy().astype(np.float32))


def _integers(tensor: torch.Tensor) -> IntArray:
    array: IntArray = tensor.numpy().astype(np.int64)
    return array


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"--data: {path} does not exist; allowed is the folder of a finished capture")
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"--data: {path} is no JSON: {error}") from error
    return content


def _read_meta(folder: Path) -> DataMeta:
    path = folder / META_NAME
    content = _read_json(path)
    if content.get("format") != FORMAT:
        raise ConfigError(
            f"--data: {path} has format {content.get('format')!r}: allowed is {FORMAT}, of a capture by this version"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    content |= {"digest": digest, "anchor_layers": tuple(content["anchor_layers"])}
    return DataMeta(**{name: content[name] for name in DataMeta.__dataclass_fields__})
