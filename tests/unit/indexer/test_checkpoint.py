"""Checkpoints of indexers: what is saved comes back, and damage of every kind is told."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.indexer import checkpoint
from flashmemory_vllm.indexer.checkpoint import (
    FILE_NAME,
    METADATA_KEY,
    VERSION,
    check_indexer,
    fetched_commit,
    load_indexer,
    read_spec,
    resolve_indexer,
    round_weights,
    save_indexer,
)
from flashmemory_vllm.indexer.neural_model import NeuralIndexer
from tests.unit.indexer.test_neural import SPEC, make_model

CPU = torch.device("cpu")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_indexer(make_model(), tmp_path / FILE_NAME)
    return tmp_path / FILE_NAME


def _metadata(version: int = VERSION, **changes: object) -> dict[str, str]:
    return {METADATA_KEY: json.dumps({"version": version, "spec": asdict(SPEC) | changes})}


def test_what_is_saved_comes_back(path: Path) -> None:
    model = load_indexer(path, CPU)
    assert model.spec == read_spec(path) == SPEC
    assert not any(weight.requires_grad for weight in model.parameters())
    for name, weight in make_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_a_head_comes_back_too(path: Path) -> None:
    spec = replace(SPEC, memory_decays=(0.0, 0.9), forecast_threshold=0.25)
    model = NeuralIndexer(spec)
    model.init_weights(torch.Generator().manual_seed(3))
    save_indexer(model, path)
    stored = load_indexer(path, CPU)
    assert stored.spec == spec
    assert stored.head is not None
    assert model.head is not None
    assert torch.equal(stored.head.hidden, model.head.hidden)
    save_file(load_file(path), path, metadata=_metadata())
    with pytest.raises(ConfigError, match=r"weights \['head.bias', .* are missing or unknown"):
        load_indexer(path, CPU)


def test_what_was_made_before_there_was_a_head_has_none(path: Path) -> None:
    older = {name: value for name, value in asdict(SPEC).items() if name not in {"memory_decays", "forecast_threshold"}}
    content = json.dumps({"version": 3, "spec": older})
    save_file(load_file(path), path, metadata={METADATA_KEY: content})
    model = load_indexer(path, CPU)
    assert (model.spec, model.head) == (SPEC, None)


def test_heads_that_know_less_are_refused(path: Path) -> None:
    weights = load_file(path)
    save_file(weights, path, metadata=_metadata(4))
    assert load_indexer(path, CPU).spec == SPEC
    save_file(weights, path, metadata=_metadata(4, memory_decays=[0.0, 0.9]))
    with pytest.raises(ConfigError, match="has the format version '4 with a head': allowed are 5, and without a head"):
        load_indexer(path, CPU)


def test_the_large_weights_are_rounded_as_they_are_stored(path: Path) -> None:
    model = NeuralIndexer(SPEC)
    model.init_weights(torch.Generator().manual_seed(3))
    save_indexer(model, path)
    stored = load_indexer(path, CPU).state_dict()
    assert not torch.equal(stored["query_up"], model.query_up)
    round_weights(model)
    for name, weight in model.state_dict().items():
        assert torch.equal(stored[name], weight)


def test_a_truncated_file_is_refused(path: Path) -> None:
    for size in (path.stat().st_size - 1, 100, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ConfigError, match=r"cannot be read: .*; allowed is a whole safetensors file"):
            load_indexer(path, CPU)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["query_up", "key_spread", "calibration"])
def test_a_number_that_is_none_is_refused(path: Path, name: str, value: float) -> None:
    weights = load_file(path)
    weights[name].view(-1)[-1] = value
    save_file(weights, path, metadata=_metadata())
    with pytest.raises(ConfigError, match=f"{name} has NaN or infinite values"):
        load_indexer(path, CPU)


def test_other_weights_are_refused(path: Path) -> None:
    weights = load_file(path)
    save_file({name: weight for name, weight in weights.items() if name != "bias"}, path, metadata=_metadata())
    with pytest.raises(ConfigError, match=r"weights \['bias'\] are missing or unknown"):
        load_indexer(path, CPU)
    save_file(weights | {"gate": weights["gate"][:, :-1].clone()}, path, metadata=_metadata())
    with pytest.raises(ConfigError, match=r"gate has the shape \[3, 11, 3\], its spec says \[3, 12, 3\]"):
        load_indexer(path, CPU)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "pt"}, "has no 'flashmemory_indexer' in its metadata: it is another kind of file"),
        (None, "has no 'flashmemory_indexer' in its metadata"),
        (_metadata(version=2), "has the format version 2: allowed are 5, and without a head 3 and 4"),
        ({METADATA_KEY: "{"}, "has no valid spec"),
        ({METADATA_KEY: "{}"}, "has no valid spec in its metadata: KeyError"),
        (_metadata(other=3), r"fields \['other'\] are missing or unknown"),
        (_metadata(aggregate="sum"), "aggregate is 'sum'"),
        (_metadata(chunk_size=3), "chunk_size is 3 and reach 1 at the block size 8"),
        (_metadata(memory_decays=[0.5, 2]), r"memory_decays are \[0.5, 2\]"),
        (_metadata(anchor_layers=[0, 1, 99]), r"anchor_layers are \[0, 1, 99\], num_layers is"),
        (_metadata(reach=3), "chunk_size is 4 and reach 3 at the block size 8"),
    ],
)
def test_other_metadata_are_refused(path: Path, metadata: dict[str, str] | None, message: str) -> None:
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(ConfigError, match=message):
        read_spec(path)


def test_equal_weights_make_equal_files(path: Path, tmp_path: Path) -> None:
    for number in range(5):
        save_indexer(make_model(), tmp_path / f"{number}.safetensors")
        assert (tmp_path / f"{number}.safetensors").read_bytes() == path.read_bytes()


def test_files_and_folders_are_found(path: Path) -> None:
    assert resolve_indexer(str(path)) == resolve_indexer(str(path.parent)) == path


@pytest.mark.parametrize("name", ["/no/such/file", "missing/indexer.safetensors", "one-word", "a/b/c"])
def test_what_is_neither_file_nor_hub_id_is_refused(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"allowed is a file, a folder with indexer\.safetensors, or a Hugging Face id"
    ):
        resolve_indexer(name)


def test_a_hub_id_is_fetched(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(repo_id: str, filename: str, revision: str | None) -> str:
        asked.append((repo_id, filename, revision))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert resolve_indexer("owner/name") == resolve_indexer("owner/name", "v1") == path
    assert asked == [("owner/name", FILE_NAME, None), ("owner/name", FILE_NAME, "v1")]


def test_a_hub_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repo_id: str, filename: str, revision: str | None) -> str:
        raise ConnectionError(f"no way to {repo_id}/{filename} of {revision}\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ConfigError, match=r"could not be fetched .*Hub \(no way to owner/name/indexer.safetensors of "):
        resolve_indexer("owner/name")
    with pytest.raises(ConfigError, match=r"could not be fetched .*Hub at the revision 'v1' \(no way to "):
        resolve_indexer("owner/name", "v1")


def test_a_revision_of_a_file_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"indexer_revision is 'v1' .* allowed is a revision with a Hugging Face id"):
        resolve_indexer(str(path), "v1")


def test_a_fetched_file_lies_in_a_folder_of_its_commit(path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert fetched_commit(Path("/cache/models--owner--name/snapshots") / commit / FILE_NAME) == commit
    assert fetched_commit(path) is None
    assert fetched_commit(Path("/models/snapshots/best") / FILE_NAME) is None


def test_a_file_is_opened_once_for_its_spec(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def open_once(file: Path, framework: str) -> safe_open:
        opened.append(file)
        return safe_open(file, framework=framework)

    monkeypatch.setattr(checkpoint, "safe_open", open_once)
    assert [read_spec(path) for _ in range(3)] == [SPEC] * 3
    assert opened == [path]
    save_indexer(NeuralIndexer(replace(SPEC, tau=99)), path)
    assert read_spec(path).tau == 99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int32])
def test_weights_of_another_dtype_are_refused(path: Path, dtype: torch.dtype) -> None:
    save_file(load_file(path) | {"bias": torch.zeros(3, dtype=dtype)}, path, metadata=_metadata())
    with pytest.raises(ConfigError, match=r"bias has the dtype \w+, allowed are F16, F32"):
        load_indexer(path, CPU)


def test_a_check_without_torch_finds_what_loading_does(path: Path) -> None:
    assert check_indexer(path) == SPEC
    save_file(load_file(path) | {"bias": torch.full((3,), float("nan"))}, path, metadata=_metadata())
    with pytest.raises(ConfigError, match="bias has NaN or infinite values"):
        check_indexer(path)
