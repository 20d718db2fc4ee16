"""The shipped indexer belongs to the shipped model."""

import json

import pytest
import torch

from flashmemory_vllm.cli import app
from flashmemory_vllm.indexer.checkpoint import FILE_NAME, load_indexer, resolve_indexer
from flashmemory_vllm.reference import reference_indexer_path, reference_model_path

MAX_BYTES = 2_000_000
# What the CPU's attention kernels take, and configs/reference.yaml
BLOCK_SIZE = 32


def test_its_folder_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["reference", "indexer"]) == 0
    assert capsys.readouterr().out.strip() == str(reference_indexer_path())


def test_it_fits_the_model() -> None:
    path = resolve_indexer(str(reference_indexer_path()))
    spec = load_indexer(path, torch.device("cpu")).spec
    fields = json.loads((reference_model_path() / "config.json").read_text(encoding="utf-8"))
    assert (spec.num_layers, spec.num_query_heads, spec.num_kv_heads, spec.head_dim) == (
        fields["num_hidden_layers"],
        fields["num_attention_heads"],
        fields["num_key_value_heads"],
        fields["head_dim"],
    )
    assert spec.block_size == BLOCK_SIZE
    assert path.stat().st_size < MAX_BYTES


def test_it_has_a_card_and_curves() -> None:
    names = {path.name for path in reference_indexer_path().iterdir()}
    assert {FILE_NAME, "indexer.md", "indexer.png", "indexer.curves.json"} <= names
