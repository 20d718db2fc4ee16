"""Serving scenarios say what every server gets, and what makes no sense in one is refused with its name."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from flashmemory_vllm.benchmark.scenario import check_fields, read_fields
from flashmemory_vllm.benchmark.serving_scenario import (
    KV_BYTES_CLASS,
    KV_BYTES_METHOD,
    ServingScenario,
    make_serving_cells,
)
from flashmemory_vllm.config import SECTION, FlashMemoryConfig
from flashmemory_vllm.errors import ConfigError
from tests.unit.benchmark.serving_twins import LOAD, MODEL, make_cell, make_scenario

FOLDER = Path(__file__).parents[3] / "configs" / "bench"
FILES = sorted(FOLDER.glob("serving*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_files_name_themselves_and_fit_their_engines(path: Path) -> None:
    scenario = check_fields(ServingScenario, path, read_fields(path))
    assert scenario.name == path.stem
    FlashMemoryConfig.from_additional_config({SECTION: scenario.flashmemory})
    for cell in make_serving_cells(scenario, None, MODEL):
        tokens = (cell.load.prompt_tokens or 0) + (cell.load.output_tokens or 0)
        assert tokens <= cell.options["max-model-len"]


def test_the_files_are_there() -> None:
    assert [path.stem for path in FILES] == ["serving-smoke", "serving"]


def test_engines_get_the_same_memory_and_differ_in_what_their_names_say() -> None:
    scenario = make_scenario(changes={"fp8": {"max_num_seqs": 9}})
    stock, fp8, offload, ours = (dict(cell.options) for cell in make_serving_cells(scenario, None, MODEL))
    assert stock == {
        "load-format": "dummy",
        "worker-extension-cls": KV_BYTES_CLASS,
        "max-num-seqs": 8,
        "kv-cache-memory-bytes": 2 << 30,
    }
    assert fp8 == stock | {"kv-cache-dtype": "fp8", "max-num-seqs": 9}
    assert offload == stock | {"kv-offloading-size": 4.0}
    assert ours == stock | {
        "attention-backend": "flashmemory",
        "additional-config": {"flashmemory": {"host_memory_gib": 8}},
    }


def test_the_class_that_counts_bytes_is_there() -> None:
    module, _, name = KV_BYTES_CLASS.rpartition(".")
    assert hasattr(getattr(importlib.import_module(module), name), KV_BYTES_METHOD)


def test_engines_get_the_same_prompts_and_loads_others() -> None:
    scenario = make_scenario(loads=[LOAD, LOAD | {"name": "m"}])
    cells = make_serving_cells(scenario, ["stock", "flashmemory", "stock"], MODEL)
    assert [cell.key[1:] for cell in cells] == [
        ("l", "stock"),
        ("m", "stock"),
        ("l", "flashmemory"),
        ("m", "flashmemory"),
    ]
    assert cells[0].seed == cells[2].seed != cells[1].seed
    assert cells[0].server_key == cells[1].server_key != cells[2].server_key


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine": {}}, "engine.kv_cache_memory_gib is missing"),
        ({"changes": {"fp8": {"kv_cache_memory_gib": 3.0}}}, "changes of fp8: kv_cache_memory_gib is the same"),
        ({"loads": [LOAD, LOAD]}, "loads named l twice"),
        ({"loads": []}, "loads"),
        ({"engines": ["ideal"]}, "'ideal'"),
        ({"itl_limit_ms": 0.0}, "itl_limit_ms"),
        ({"loads": [LOAD | {"shared_prefix_tokens": 100}]}, "allowed below prompt_tokens"),
        ({"loads": [{"name": "l", "requests": 4}]}, "allowed is one of"),
        ({"loads": [{"name": "l", "requests": 4, "prompt_tokens": 9}]}, "allowed is one of"),
        ({"loads": [LOAD | {"lengths": "f"}]}, "allowed is one of"),
        ({"loads": [{"name": "l", "requests": 4, "lengths": "f", "spread": 0.5}]}, "go with prompt_tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_scenario(**changes)


@pytest.mark.parametrize(
    "text",
    [None, "", "no json", '{"input_length": 3}\n' * 2, '{"input_length": 0, "output_length": 1}\n' * 2, "[1]\n[1]"],
)
def test_a_file_of_lengths_is_read_before_a_server_starts(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"lengths is .*lengths.jsonl"):
        make_cell({"name": "l", "requests": 2, "lengths": str(path)})
