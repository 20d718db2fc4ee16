"""A folder of recorded documents: sharded safetensors, resumable, never more than it may take.

meta.json                what was recorded, of which model, and how
shard-00000.safetensors  whole documents, `doc0.keys`, `doc0.queries`, ..., `doc1.keys`, ...
index.json               the shards; written last, so a folder that has it is complete
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flashmemory_vllm.capture.document import Array, with_prefix
from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.files import whole_file, write_json

FORMAT = 4
SHARD_BYTES = 512 << 20
GIB = 1 << 30
# Room for the header of a shard, which names every tensor, and for one document's part of it.
_HEADER_BYTES = 4096
_DOCUMENT_HEADER_BYTES = 2048
# Fields that older folders lack, and what they mean
_LATER: dict[str, Any] = {"layer_indices": []}
_META, _INDEX, _SHARDS = "meta.json", "index.json", "shard-*.safetensors"


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The model's part of `meta.json`.

    Attributes:
        num_layers: layers of full attention.
        num_query_heads: query heads.
        num_kv_heads: KV heads.
        head_dim: elements of a key.
        block_size: tokens in a block.
        anchor_layers: layers whose queries and pooled keys are recorded, counted among those.
        softmax_scale: factor on `q . k`.
        dtype: dtype of the model's keys.
        layer_indices: of the layers of full attention, among all layers of the model; empty if it has no others.
    """

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    anchor_layers: tuple[int, ...]
    softmax_scale: float
    dtype: str
    layer_indices: tuple[int, ...] = ()

    def places(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Layers of the model, counted among those of full attention; ascending, -1 for one that is none of them."""
        known = list(self.layer_indices or range(self.num_layers))
        return tuple(sorted({known.index(layer) if layer in known else -1 for layer in layers}))


@dataclass(frozen=True, slots=True)
class CaptureMeta:
    """What `meta.json` says, but for the number of documents.

    Attributes:
        model: name of the model.
        model_type: its architecture, as its configuration names it.
        shape: sizes of its attention.
        chunk_size: tokens in a chunk, over which keys are pooled.
        query_window: newest tokens of a prompt whose queries are kept, the last one among them.
        window: decode steps that one selection is to serve.
        delay: decode steps from a selection's queries until its scores are asked for.
        provenance: where the data come from, and what must be equal for a capture to be continued.
    """

    model: str
    model_type: str
    shape: ModelShape
    chunk_size: int
    query_window: int
    window: int
    delay: int
    provenance: Mapping[str, Any]

    def as_json(self, num_documents: int) -> dict[str, Any]:
        """The object of `meta.json`."""
        flat = asdict(self)
        return {"format": FORMAT, **flat.pop("shape"), **flat, "documents": num_documents}


def is_complete(folder: Path) -> bool:
    """Whether a capture was finished there."""
    return (folder / _INDEX).is_file()


def begun_anchors(folder: Path) -> tuple[int, ...] | None:
    """Anchor layers of the capture that was begun there; None if there is none.

    Raises:
        ConfigError: the folder does not say.
    """
    return tuple(_read_meta(folder)["anchor_layers"]) if (folder / _META).is_file() else None


def differences(folder: Path, meta: CaptureMeta) -> list[str]:
    """What tells the capture in a folder from another one that would be continued there; empty for the same.

    Raises:
        ConfigError: the folder does not say what was recorded.
    """
    ours, theirs = _identity(meta.as_json(0)), _identity(_read_meta(folder))
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def recorded_shape(folder: Path) -> tuple[str, ModelShape]:
    """Architecture and sizes of the model whose capture is in a folder.

    Raises:
        ConfigError: the folder does not say.
    """
    found = _read_meta(folder)
    return found["model_type"], ModelShape(**{field.name: found[field.name] for field in fields(ModelShape)})


class CaptureWriter:
    """Writes documents in order. A shard is there whole or not at all.

    Args:
        folder: where to; created.
        meta: what is recorded.
        max_bytes: most bytes of all shards, those of an earlier run included.
        shard_bytes: most bytes of one shard. Default: 512 MiB.

    Attributes:
        num_documents: documents that need not be recorded again: those in complete shards, then those added.

    Raises:
        ConfigError: the folder holds a complete capture, or the beginning of another one.
    """

    def __init__(self, folder: Path, meta: CaptureMeta, max_bytes: int, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._meta = meta
        self._max_bytes = max_bytes
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Array] = {}
        self._num_pending = 0
        self._pending_bytes = _HEADER_BYTES
        folder.mkdir(parents=True, exist_ok=True)
        if is_complete(folder):
            raise ConfigError(f"--out: {folder} holds a complete capture; allowed is another folder")
        self._continue_or_begin()
        self._shards = [_describe(path) for path in sorted(folder.glob(_SHARDS))]
        self._written_bytes = sum(shard["bytes"] for shard in self._shards)
        self.num_documents = sum(shard["documents"] for shard in self._shards)

    @property
    def block_size(self) -> int:
        """Tokens in a block of the recorded model."""
        return self._meta.shape.block_size

    def add(self, tensors: Mapping[str, Array]) -> bool:
        """Keep one document, and write a shard if it would not fit beside those kept.

        Args:
            tensors: by name, see `Document.tensors`.

        Returns:
            False if the document would break the limit of all shards. It is not kept, and nothing should follow.

        Raises:
            ConfigError: it is larger than a shard, or the very first one breaks the limit.
        """
        size = _DOCUMENT_HEADER_BYTES + sum(tensor.nbytes for tensor in tensors.values())
        if _HEADER_BYTES + size > self._shard_bytes:
            raise ConfigError(
                f"capture: document {self.num_documents} takes {size / GIB:.3f} GiB, allowed are "
                f"{self._shard_bytes / GIB:.3f}; lower --max-output-tokens or --tokens, or raise --every"
            )
        if self._written_bytes + self._pending_bytes + size > self._max_bytes:
            if not self.num_documents:
                raise ConfigError(
                    f"--max-gib: {self._max_bytes / GIB:g} given, the first document alone takes {size / GIB:.3g}"
                )
            return False
        if self._pending_bytes + size > self._shard_bytes:
            self.flush()
        self._pending.update(with_prefix(self._num_pending, tensors))
        self._num_pending += 1
        self._pending_bytes += size
        self.num_documents += 1
        return True

    def flush(self) -> None:
        """Write what is kept as a shard, so that an interrupted capture goes on behind it."""
        if not self._num_pending:
            return
        path = self._folder / f"shard-{len(self._shards):05d}.safetensors"
        with whole_file(path) as partial:
            save_file(self._pending, partial, metadata={"documents": str(self._num_pending)})
        self._shards.append(_describe(path))
        self._written_bytes += self._shards[-1]["bytes"]
        self._pending, self._num_pending, self._pending_bytes = {}, 0, _HEADER_BYTES

    def finish(self) -> None:
        """Write what is kept, then the final `meta.json` and the index that marks the folder as complete."""
        self.flush()
        write_json(self._folder / _META, self._meta.as_json(self.num_documents))
        write_json(self._folder / _INDEX, {"shards": self._shards})

    def _continue_or_begin(self) -> None:
        path = self._folder / _META
        if path.is_file():
            if differing := differences(self._folder, self._meta):
                raise ConfigError(
                    f"--out: {self._folder} holds the beginning of another capture, which differs in "
                    f"{', '.join(differing)}; allowed is another folder, or what it was begun with"
                )
        elif any(self._folder.glob(_SHARDS)):
            raise ConfigError(f"--out: {self._folder} has shards but no {_META}; allowed is an empty folder")
        else:
            write_json(path, self._meta.as_json(0))


def _read_meta(folder: Path) -> dict[str, Any]:
    """The object of `meta.json`, with all that it has to have."""
    path = folder / _META
    needed = {"model_type", "provenance", "documents", *(field.name for field in fields(ModelShape))} - {*_LATER}
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        wrong = None if isinstance(found, dict) and needed <= found.keys() else "fields are missing"
    except (OSError, ValueError) as error:
        wrong = str(error)
    if wrong is not None:
        raise ConfigError(f"--out: {path} does not say what was recorded ({wrong}); allowed is another folder")
    return {**_LATER, **found}


def _identity(meta: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for a capture to be continued; as JSON, which has no tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(meta))
    provenance = plain.pop("provenance")
    plain.pop("documents")
    return plain | {name: provenance.get(name) for name in ("prompts", "every", "layer_mass")}


def _describe(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="numpy") as shard:
            documents = int(shard.metadata()["documents"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no complete shard ({error}): remove it and what follows it") from None
    return {"file": path.name, "documents": documents, "bytes": path.stat().st_size}
