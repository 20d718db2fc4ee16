"""A scenario file is read strictly: what is misspelt or impossible is named, never ignored."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from flashmemory_vllm.benchmark.cells import make_cells
from flashmemory_vllm.benchmark.scenario import EngineOptions, load_scenario
from flashmemory_vllm.config import SECTION, FlashMemoryConfig
from flashmemory_vllm.errors import ConfigError

FOLDER = Path(__file__).parents[3] / "configs" / "bench"
# Scenarios of the kind `serving` are read in test_serving_scenario.py
FILES = sorted(path for path in FOLDER.glob("*.yaml") if not path.stem.startswith("serving"))
MEASUREMENT = {"name": "m", "batch": 2, "prompt_tokens": 100, "output_tokens": 20}


def write(path: Path, **fields: Any) -> Path:
    file = path / "scenario.yaml"
    whole = {"name": "s", "why": "?", "measurements": [MEASUREMENT], **fields}
    file.write_text(yaml.safe_dump(whole))
    return file


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_files_name_themselves_and_hold_options_that_we_allow(path: Path) -> None:
    scenario = load_scenario(path)
    assert scenario.name == path.stem
    for cell in make_cells(scenario, ("stock", "flashmemory"), {}):
        FlashMemoryConfig.from_additional_config({SECTION: cell.setup.ours or {}})
        longest = max(cell.work.prompt_lens) + cell.work.output_tokens + cell.work.slack_tokens
        limit = cell.setup.llm["max_model_len"]
        assert limit == -1 or longest <= limit


def test_there_is_a_file_for_every_shipped_scenario() -> None:
    assert [path.stem for path in FILES] == [
        "checksums",
        "hybrids",
        "p1",
        "p2",
        "p3",
        "p4",
        "p5",
        "p6",
        "real-step",
        "smoke",
        "sweep",
    ]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"engine": {"max_model_length": 8}}, "engine.max_model_length"),
        ({"engine": {"max_num_seqs": 0}}, "engine.max_num_seqs"),
        ({"engine": {"max_model_len": "longest"}}, "'longest'"),
        ({"measurements": []}, "one measurement or more"),
        ({"measurements": [MEASUREMENT, MEASUREMENT]}, "measurements named m twice"),
        ({"measurements": [MEASUREMENT | {"engines": ["vllm"]}]}, "'vllm'"),
        ({"measurements": [MEASUREMENT | {"mix": [{"count": 1, "prompt_tokens": 8}]}]}, "or mix"),
        ({"measurements": [{"name": "m", "batch": 2, "output_tokens": 20}]}, "or mix"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_scenario(write(tmp_path, **fields))
    assert said in str(refusal.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    for path in (broken, tmp_path / "missing.yaml"):
        with pytest.raises(ConfigError, match=path.name):
            load_scenario(path)
    broken.write_text("[]")
    with pytest.raises(ConfigError, match="allowed is a mapping"):
        load_scenario(broken)


def test_settings_replace_what_the_file_says(tmp_path: Path) -> None:
    settings = ["engine.max_num_seqs=3", "flashmemory.selector=exact", "measurements.0.batch=5"]
    scenario = load_scenario(write(tmp_path), settings)
    assert scenario.engine.max_num_seqs == 3
    assert scenario.flashmemory == {"selector": "exact"}
    assert scenario.measurements[0].prompt_lens() == [100] * 5


@pytest.mark.parametrize("setting", ["engine.max_num_seqs", "measurements.7.batch=1", "name.x=1", "why=["])
def test_a_setting_that_fits_nowhere_is_refused(setting: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--set is"):
        load_scenario(write(tmp_path), [setting])


def test_a_sweep_is_a_grid_without_what_is_too_large(tmp_path: Path) -> None:
    sweep = {"prompt_tokens": [400, 100], "batch": [4, 1], "max_total_tokens": 1000, "output_tokens": 9}
    scenario = load_scenario(write(tmp_path, measurements=[], sweep=sweep | {"keep_prefixes": True}))
    measurements = scenario.all_measurements()
    # Shorter prompts and smaller batches first: what they leave in the prefix cache is what the next ones begin with
    assert [one.name for one in measurements] == ["1x100", "4x100", "1x400"]
    assert all(one.must_fit and one.keep_prefixes and one.output_tokens == 9 for one in measurements)


def test_options_update_each_other_by_what_is_given() -> None:
    base = EngineOptions(max_num_seqs=4, kv_cache_memory_gib=2.0, llm={"seed": 1, "swap": 2})
    changed = base.updated(EngineOptions(kv_cache_memory_gib=None, llm={"seed": 3}))
    assert (changed.max_num_seqs, changed.kv_cache_memory_gib) == (4, None)
    assert changed.llm == {"seed": 3, "swap": 2}
