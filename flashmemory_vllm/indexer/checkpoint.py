"""Files of neural indexers: safetensors with the spec in their metadata, checked before anything is used."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

import torch
from flashmemory_kernels.ensemble_scores import Aggregate
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.indexer.base import IndexGeometry
from flashmemory_vllm.indexer.neural_model import IndexerSpec, NeuralIndexer

# The one key of the metadata: safetensors writes several in any order, and equal weights should make equal files
METADATA_KEY = "flashmemory_indexer"
VERSION = 3
FILE_NAME = "indexer.safetensors"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMPARED = ("num_query_heads", "num_kv_heads", "head_dim", "block_size", "anchor_layers")


def resolve_indexer(indexer: str) -> Path:
    """Find a checkpoint; fetch it if it is on the Hugging Face Hub.

    Args:
        indexer: a file, a folder with an `indexer.safetensors`, or the id `owner/name` of such a repository.

    Raises:
        ConfigError: there is no such file, or it could not be fetched.
    """
    path = Path(indexer).expanduser()
    if path.is_dir():
        path /= FILE_NAME
    if path.is_file():
        return path
    if not _HUB_ID.fullmatch(indexer) or indexer.endswith(".safetensors"):
        raise ConfigError(
            f"indexer is {indexer!r}: allowed is a file, a folder with {FILE_NAME}, or a Hugging Face id owner/name"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(indexer, FILE_NAME))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"indexer is {indexer!r}: no such file, and {FILE_NAME} could not be fetched from the Hugging Face Hub "
            f"({reason})"
        ) from error


def save_indexer(model: NeuralIndexer, path: Path) -> None:
    """Write weights, in the precision of `round_weights`, and spec, whole or not at all."""
    half = {name for name, _ in _matrices(model)}
    weights = {
        name: value.detach().cpu().contiguous().to(torch.float16 if name in half else value.dtype)
        for name, value in model.state_dict().items()
    }
    content = {"version": VERSION, "spec": asdict(model.spec)}
    partial = path.with_name(path.name + ".partial")
    save_file(weights, partial, metadata={METADATA_KEY: json.dumps(content)})
    partial.replace(path)


@torch.no_grad()
def round_weights(model: NeuralIndexer) -> None:
    """Round the large weights to the float16 that they are stored in; what is measured then is what is served."""
    for _, weight in _matrices(model):
        weight.copy_(weight.half())


def _matrices(model: NeuralIndexer) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Weights of three dims; others are few and are scales or offsets of them."""
    return ((name, weight) for name, weight in model.named_parameters() if weight.dim() == 3)


def read_spec(path: Path) -> IndexerSpec:
    """The spec of a checkpoint; weights are not read.

    Raises:
        ConfigError: the file is truncated, or no indexer of this version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"indexer {path} cannot be read: {error}; allowed is a whole safetensors file") from error
    if METADATA_KEY not in metadata:
        raise ConfigError(f"indexer {path} has no {METADATA_KEY!r} in its metadata: it is another kind of file")
    try:
        content = json.loads(metadata[METADATA_KEY])
        version, spec = content["version"], content["spec"]
        if version == VERSION:
            return _spec_of(spec)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"indexer {path} has no valid spec in its metadata: {error!r}") from error
    raise ConfigError(f"indexer {path} has the format version {version!r}: allowed is {VERSION}")


def load_indexer(path: Path, device: torch.device) -> NeuralIndexer:
    """Read a checkpoint and check every weight.

    Args:
        path: as `resolve_indexer` tells it.
        device: where the weights go; on "meta" they are not read.

    Returns:
        The model, in evaluation mode, without gradients.

    Raises:
        ConfigError: the file is truncated, lacks a weight, or has one of another shape or with NaN or infinity.
    """
    spec = read_spec(path)
    with device:
        model = NeuralIndexer(spec)
    model.requires_grad_(requires_grad=False).eval()
    if device.type == "meta":
        return model
    wanted = model.state_dict()
    with safe_open(path, framework="pt") as file:
        # A set of names that mentions each difference, before any is read
        if different := sorted(set(file.keys()) ^ set(wanted)):
            raise ConfigError(f"indexer {path}: weights {different} are missing or unknown")
        weights = {name: file.get_tensor(name) for name in wanted}
    for name, weight in weights.items():
        if weight.shape != wanted[name].shape:
            raise ConfigError(
                f"indexer {path}: {name} has the shape {list(weight.shape)}, its spec says {list(wanted[name].shape)}"
            )
        if not bool(weight.isfinite().all()):
            raise ConfigError(f"indexer {path}: {name} has NaN or infinite values, allowed are finite ones")
    model.load_state_dict(weights)
    return model


def check_fits(spec: IndexerSpec, geometry: IndexGeometry, source: str) -> None:
    """Refuse an indexer that was trained for another model or block size.

    Args:
        spec: the indexer's.
        geometry: the model that is served.
        source: names the indexer in the message.

    Raises:
        ConfigError: sizes differ; the message lists all of them.
    """
    differences = [
        f"{name} {_plain(getattr(spec, name))} (served: {_plain(getattr(geometry, name))})"
        for name in _COMPARED
        if getattr(spec, name) != getattr(geometry, name)
    ]
    if differences:
        raise ConfigError(f"indexer {source!r} was trained for {spec.model!r} with " + ", ".join(differences))


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _spec_of(given: Mapping[str, Any]) -> IndexerSpec:
    names = {field.name for field in fields(IndexerSpec)}
    if different := sorted(names ^ set(given)):
        raise ValueError(f"fields {different} are missing or unknown")
    spec = IndexerSpec(**{**given, "anchor_layers": tuple(given["anchor_layers"])})
    if spec.aggregate not in get_args(Aggregate):
        raise ValueError(f"aggregate is {spec.aggregate!r}")
    if spec.block_size % spec.chunk_size or not 0 <= spec.reach <= spec.chunks_per_block:
        raise ValueError(f"chunk_size is {spec.chunk_size} and reach {spec.reach} at the block size {spec.block_size}")
    return spec
