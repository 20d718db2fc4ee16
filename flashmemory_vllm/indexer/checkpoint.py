"""Files of neural indexers: safetensors with the spec in their metadata, checked before anything is used."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from flashmemory_kernels.common import Aggregate
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.files import whole_file
from flashmemory_vllm.indexer.base import IndexGeometry
from flashmemory_vllm.indexer.neural_model import IndexerSpec, NeuralIndexer

# The one key of the metadata: safetensors writes several in any order, and equal weights should make equal files
METADATA_KEY = "flashmemory_indexer"
VERSION = 5
# Before there was a head, and before heads knew the mix of what is remembered
_WITHOUT_HEADS, _OLDER_HEADS = 3, 4
FILE_NAME = "indexer.safetensors"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# As safetensors calls them
_DTYPES = ("F16", "F32")
_WITHOUT_HEAD = {"memory_decays": (), "forecast_threshold": 0.5}
_COMPARED = ("num_query_heads", "num_kv_heads", "head_dim", "anchor_layers")


def resolve_indexer(indexer: str, revision: str | None = None) -> Path:
    """Find a checkpoint; fetch it if it is on the Hugging Face Hub.

    Args:
        indexer: a file, a folder with an `indexer.safetensors`, or the id `owner/name` of such a repository.
        revision: branch, tag or commit of the repository. Default: its main branch. A commit that was fetched before
            needs no network.

    Raises:
        ConfigError: there is no such file, it could not be fetched, or a file of this machine is given with a revision.
    """
    path = Path(indexer).expanduser()
    if path.is_dir():
        path /= FILE_NAME
    if path.is_file():
        if revision is not None:
            raise ConfigError(
                f"indexer_revision is {revision!r} and indexer is {indexer!r}, a file of this machine: allowed is a "
                "revision with a Hugging Face id"
            )
        return path
    if not _HUB_ID.fullmatch(indexer) or indexer.endswith(".safetensors"):
        raise ConfigError(
            f"indexer is {indexer!r}: allowed is a file, a folder with {FILE_NAME}, or a Hugging Face id owner/name"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(indexer, FILE_NAME, revision=revision))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        at_revision = "" if revision is None else f" at the revision {revision!r}"
        raise ConfigError(
            f"indexer is {indexer!r}: no such file, and {FILE_NAME} could not be fetched from the Hugging Face Hub"
            f"{at_revision} ({reason})"
        ) from error


def fetched_commit(path: Path) -> str | None:
    """The commit that a fetched checkpoint is of; None for a file that was not fetched.

    Args:
        path: as `resolve_indexer` tells it. In the Hub's cache files lie in a folder with the name of their commit.
    """
    folder = path.parent
    return folder.name if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) else None


def save_indexer(model: NeuralIndexer, path: Path) -> None:
    """Write weights, in the precision of `round_weights`, and spec, whole or not at all."""
    half = {name for name, _ in _matrices(model)}
    weights = {
        name: value.detach().cpu().contiguous().to(torch.float16 if name in half else value.dtype)
        for name, value in model.state_dict().items()
    }
    content = {"version": VERSION, "spec": asdict(model.spec)}
    with whole_file(path) as partial:
        save_file(weights, partial, metadata={METADATA_KEY: json.dumps(content)})


@torch.no_grad()
def round_weights(model: NeuralIndexer) -> None:
    """Round the large weights to the float16 that they are stored in; what is measured then is what is served."""
    for _, weight in _matrices(model):
        weight.copy_(weight.half())


def _matrices(model: NeuralIndexer) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Weights of three dims; others are few and are scales or offsets of them."""
    return ((name, weight) for name, weight in model.named_parameters() if weight.dim() == 3)


def read_spec(path: Path) -> IndexerSpec:
    """The spec of a checkpoint; weights are not read. A process opens a file that does not change once.

    Raises:
        ConfigError: the file is truncated, or no indexer of this version.
    """
    try:
        found = path.stat()
        return _read_spec(path, (found.st_ino, found.st_size, found.st_mtime_ns))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"indexer {path} cannot be read: {error}; allowed is a whole safetensors file") from error


@lru_cache(maxsize=8)
def _read_spec(path: Path, identity: tuple[int, ...]) -> IndexerSpec:  # noqa: ARG001 - another file is read again
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
    if METADATA_KEY not in metadata:
        raise ConfigError(f"indexer {path} has no {METADATA_KEY!r} in its metadata: it is another kind of file")
    try:
        content = json.loads(metadata[METADATA_KEY])
        version, spec = content["version"], content["spec"]
        if version in {_WITHOUT_HEADS, _OLDER_HEADS, VERSION}:
            found = _spec_of({**_WITHOUT_HEAD, **spec} if version == _WITHOUT_HEADS else spec)
            if version == VERSION or not found.memory_decays:
                return found
            version = f"{version} with a head"
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"indexer {path} has no valid spec in its metadata: {error!r}") from error
    raise ConfigError(
        f"indexer {path} has the format version {version!r}: allowed are {VERSION}, and without a head "
        f"{_WITHOUT_HEADS} and {_OLDER_HEADS}"
    )


def check_indexer(path: Path) -> IndexerSpec:
    """Read a checkpoint and check every weight, without torch.

    What torch computes on a CPU may start its threads, and a process that is forked afterwards hangs in the first thing
    that it computes: vLLM checks its options in such a process.

    Args:
        path: as `resolve_indexer` tells it.

    Returns:
        The checkpoint's spec.

    Raises:
        ConfigError: as `load_indexer`.
    """
    spec = read_spec(path)
    _checked_weights(path, _empty(spec, torch.device("meta")))
    return spec


def load_indexer(path: Path, device: torch.device) -> NeuralIndexer:
    """Read a checkpoint and check every weight.

    Args:
        path: as `resolve_indexer` tells it.
        device: where the weights go; on "meta" they are not read.

    Returns:
        The model, in evaluation mode, without gradients.

    Raises:
        ConfigError: the file is truncated, lacks a weight, or has one of another shape or dtype, or with NaN or
            infinity.
    """
    model = _empty(read_spec(path), device)
    if device.type != "meta":
        weights = _checked_weights(path, model)
        model.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
    return model


def _empty(spec: IndexerSpec, device: torch.device) -> NeuralIndexer:
    with device:
        model = NeuralIndexer(spec)
    return model.requires_grad_(requires_grad=False).eval()


def _checked_weights(path: Path, model: NeuralIndexer) -> dict[str, np.ndarray[Any, Any]]:
    """The weights that a model wants, by name."""
    wanted, weights = model.state_dict(), {}
    with safe_open(path, framework="numpy") as file:
        # A set of names that mentions each difference, before any is read
        if different := sorted(set(file.keys()) ^ set(wanted)):
            raise ConfigError(f"indexer {path}: weights {different} are missing or unknown")
        for name, place in wanted.items():
            stored = file.get_slice(name)
            if stored.get_shape() != list(place.shape):
                raise ConfigError(
                    f"indexer {path}: {name} has the shape {stored.get_shape()}, its spec says {list(place.shape)}"
                )
            if stored.get_dtype() not in _DTYPES:
                raise ConfigError(
                    f"indexer {path}: {name} has the dtype {stored.get_dtype()}, allowed are {', '.join(_DTYPES)}"
                )
            weights[name] = file.get_tensor(name)
            if not np.isfinite(weights[name]).all():
                raise ConfigError(f"indexer {path}: {name} has NaN or infinite values, allowed are finite ones")
    return weights


def check_fits(spec: IndexerSpec, geometry: IndexGeometry, source: str) -> None:
    """Refuse an indexer that was trained for another model, or whose chunks do not fill the blocks that are served.

    Args:
        spec: the indexer's.
        geometry: the model that is served.
        source: names the indexer in the message.

    Raises:
        ConfigError: sizes differ, the message lists all of them; or the block size cannot be served, the message says
            which can.
    """
    differences = [
        f"{name} {_plain(getattr(spec, name))} (served: {_plain(getattr(geometry, name))})"
        for name in _COMPARED
        if getattr(spec, name) != getattr(geometry, name)
    ]
    if differences:
        raise ConfigError(f"indexer {source!r} was trained for {spec.model!r} with " + ", ".join(differences))
    if not spec.serves(geometry.block_size):
        least = max(1, spec.reach) * spec.chunk_size
        raise ConfigError(
            f"indexer {source!r} has chunks of {spec.chunk_size} tokens, --block-size is {geometry.block_size}: "
            f"allowed are multiples of {spec.chunk_size}" + (f" from {least} on" if least > spec.chunk_size else "")
        )


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _spec_of(given: Mapping[str, Any]) -> IndexerSpec:
    names = {field.name for field in fields(IndexerSpec)}
    if different := sorted(names ^ set(given)):
        raise ValueError(f"fields {different} are missing or unknown")
    tuples = {name: tuple(given[name]) for name in ("anchor_layers", "memory_decays")}
    spec = IndexerSpec(**{**given, **tuples})
    if spec.aggregate not in get_args(Aggregate):
        raise ValueError(f"aggregate is {spec.aggregate!r}")
    if spec.reach < 0 or not spec.serves(spec.block_size):
        raise ValueError(f"chunk_size is {spec.chunk_size} and reach {spec.reach} at the block size {spec.block_size}")
    if not all(0 <= layer < spec.num_layers for layer in spec.anchor_layers):
        raise ValueError(f"anchor_layers are {list(spec.anchor_layers)}, num_layers is {spec.num_layers}")
    if not all(0 <= decay <= 1 for decay in spec.memory_decays):
        raise ValueError(f"memory_decays are {list(spec.memory_decays)}")
    return spec
