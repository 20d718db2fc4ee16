"""The folder: whole shards, whole documents, and a second run that goes on where the first one ended."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from flashmemory_vllm.capture.document import Array
from flashmemory_vllm.capture.writer import CaptureWriter, begun_anchors, differences, is_complete, recorded_shape
from flashmemory_vllm.errors import ConfigError, StorageError
from tests.helpers.disk import full_disk
from tests.unit.capture.documents import BLOCK_SIZE, make_document, make_meta

SHARD = 16_384
PLENTY = 1 << 30


def tensors_of(number: int) -> dict[str, Array]:
    return make_document(number, prompt_len=20).tensors(BLOCK_SIZE)


def read_all(folder: Path) -> list[dict[str, Array]]:
    documents: list[dict[str, Array]] = []
    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        path = folder / shard["file"]
        assert path.stat().st_size == shard["bytes"] <= SHARD
        found = load_file(path)
        for index in range(shard["documents"]):
            prefix = f"doc{index}."
            documents.append({name.removeprefix(prefix): found[name] for name in found if name.startswith(prefix)})
    return documents


def check(folder: Path, count: int) -> None:
    found = read_all(folder)
    assert len(found) == count == json.loads((folder / "meta.json").read_text())["documents"]
    for number, document in enumerate(found):
        expected = tensors_of(number)
        assert document.keys() == expected.keys()
        assert all(np.array_equal(document[name], expected[name]) for name in expected)


def test_documents_come_back_from_several_shards(tmp_path: Path) -> None:
    writer = CaptureWriter(tmp_path, make_meta(), PLENTY, SHARD)
    assert all(writer.add(tensors_of(number)) for number in range(9))
    assert not is_complete(tmp_path)
    writer.finish()
    assert is_complete(tmp_path)
    assert len(list(tmp_path.glob("shard-*"))) > 1
    assert not list(tmp_path.glob("*.partial"))
    check(tmp_path, 9)


def test_a_capture_that_was_begun_names_its_anchors_or_is_refused(tmp_path: Path) -> None:
    assert begun_anchors(tmp_path) is None
    CaptureWriter(tmp_path, make_meta(), PLENTY)
    assert begun_anchors(tmp_path) == make_meta().shape.anchor_layers
    for content in ("{", "{}", "[]"):
        (tmp_path / "meta.json").write_text(content)
        with pytest.raises(ConfigError, match=r"meta\.json does not say what was recorded"):
            begun_anchors(tmp_path)
        with pytest.raises(ConfigError, match=r"meta\.json does not say what was recorded"):
            CaptureWriter(tmp_path, make_meta(), PLENTY)


def test_an_older_folder_is_of_a_model_without_other_layers(tmp_path: Path) -> None:
    CaptureWriter(tmp_path, make_meta(), PLENTY)
    path = tmp_path / "meta.json"
    older = json.loads(path.read_text())
    del older["layer_indices"]
    path.write_text(json.dumps(older))
    assert differences(tmp_path, make_meta()) == []
    assert list(recorded_shape(tmp_path)[1].layer_indices) == []


def test_layers_are_counted_among_those_of_full_attention() -> None:
    shape = replace(make_meta().shape, layer_indices=(5, 11, 17))
    assert shape.places([17, 5, 17]) == (0, 2)
    assert shape.places([4, 11]) == (-1, 1)
    assert make_meta().shape.places([2, 0]) == (0, 2)


def test_meta_is_what_a_trainer_reads(tmp_path: Path) -> None:
    CaptureWriter(tmp_path, make_meta(seed=3), PLENTY).finish()
    assert json.loads((tmp_path / "meta.json").read_text()) == {
        "format": 4,
        "model": "m",
        "model_type": "llama",
        "num_layers": 3,
        "num_query_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "block_size": BLOCK_SIZE,
        "chunk_size": 2,
        "query_window": 3,
        "anchor_layers": [0, 2],
        "softmax_scale": 0.5,
        "dtype": "float32",
        "layer_indices": [],
        "window": 16,
        "delay": 1,
        "documents": 0,
        "provenance": {"prompts": "p", "every": 1, "seed": 3},
    }


def test_a_run_that_was_killed_goes_on_behind_its_last_shard(tmp_path: Path) -> None:
    killed = CaptureWriter(tmp_path, make_meta(), PLENTY, SHARD)
    for number in range(6):
        killed.add(tensors_of(number))
    second = CaptureWriter(tmp_path, make_meta(command="another"), PLENTY, SHARD)
    assert 0 < second.num_documents < 6
    for number in range(second.num_documents, 8):
        second.add(tensors_of(number))
    second.finish()
    check(tmp_path, 8)


def test_the_limit_ends_a_capture_with_what_fits(tmp_path: Path) -> None:
    limit = 40_000
    writer = CaptureWriter(tmp_path, make_meta(), limit, SHARD)
    added = [writer.add(tensors_of(number)) for number in range(20)]
    assert added == sorted(added, reverse=True)
    assert 1 < writer.num_documents == sum(added) < 20
    writer.finish()
    assert sum(path.stat().st_size for path in tmp_path.glob("shard-*")) <= limit
    check(tmp_path, writer.num_documents)


def test_a_document_that_can_never_be_kept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--max-gib"):
        CaptureWriter(tmp_path / "a", make_meta(), 5000, SHARD).add(tensors_of(0))
    with pytest.raises(ConfigError, match="lower --max-output-tokens"):
        CaptureWriter(tmp_path / "b", make_meta(), PLENTY, 5000).add(tensors_of(0))


def test_other_settings_are_not_mixed_into_a_folder(tmp_path: Path) -> None:
    CaptureWriter(tmp_path, make_meta(), PLENTY)
    with pytest.raises(ConfigError, match="differs in every, prompts;"):
        CaptureWriter(tmp_path, make_meta(prompts="q", every=2), PLENTY)


def test_a_complete_capture_is_left_alone(tmp_path: Path) -> None:
    CaptureWriter(tmp_path, make_meta(), PLENTY).finish()
    with pytest.raises(ConfigError, match="holds a complete capture"):
        CaptureWriter(tmp_path, make_meta(), PLENTY)


@pytest.mark.parametrize("content", [b"", b"no shard at all"])
def test_broken_shards_are_named(tmp_path: Path, content: bytes) -> None:
    CaptureWriter(tmp_path, make_meta(), PLENTY)
    (tmp_path / "shard-00000.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"shard-00000\.safetensors is no complete shard"):
        CaptureWriter(tmp_path, make_meta(), PLENTY)


def test_shards_of_nobody_are_refused(tmp_path: Path) -> None:
    (tmp_path / "shard-00000.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"has shards but no meta\.json"):
        CaptureWriter(tmp_path, make_meta(), PLENTY)


def test_a_full_disk_leaves_whole_shards_that_the_next_run_goes_on_with(tmp_path: Path) -> None:
    writer = CaptureWriter(tmp_path, make_meta(), PLENTY, SHARD)
    for number in range(4):
        writer.add(tensors_of(number))
    writer.flush()
    before = sorted(path.name for path in tmp_path.iterdir())
    writer.add(tensors_of(4))
    with full_disk(1024), pytest.raises(StorageError, match=r"shard-\d+.safetensors: cannot be written"):
        writer.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not is_complete(tmp_path)
    again = CaptureWriter(tmp_path, make_meta(), PLENTY, SHARD)
    assert again.num_documents == 4
    again.add(tensors_of(4))
    again.finish()
    check(tmp_path, 5)
