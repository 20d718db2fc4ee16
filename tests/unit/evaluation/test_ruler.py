"""RULER's driver around a stand-in for the harness; the harness itself runs in the end-to-end tests."""

import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from flashmemory_vllm.errors import ConfigError, FlashMemoryError
from flashmemory_vllm.evaluation import ruler
from flashmemory_vllm.evaluation.provenance import Provenance
from flashmemory_vllm.evaluation.ruler import DOWNLOADS, MARGIN_TOKENS, OFFLINE_TASKS, RulerOptions, run_ruler
from tests.unit.evaluation.fake_server import MAX_MODEL_LEN, MODEL, FakeServer

OPTIONS = RulerOptions(provenance=Provenance("command", "commit", "gpu", {"python": "3"}))
# Writes what the harness would, notes each run, and fails where it is told to
HARNESS = """
import json, os, sys, yaml
from pathlib import Path
assert sys.argv[1:3] == ["run", "--config"]
config = yaml.safe_load(Path(sys.argv[3]).read_text())
task, tokens = config["tasks"][0], config["metadata"]["max_seq_lengths"][0]
with open(os.environ["RUNS"], "a") as runs:
    runs.write(json.dumps({"config": config, "nltk": os.environ.get("NLTK_DATA")}) + "\\n")
if task == os.environ.get("BROKEN"):
    print("making samples")
    sys.exit("no connection")
scores = {"4096,none": -1, "4096_stderr,none": "N/A", f"{tokens},none": tokens / 1e5, f"{tokens}_stderr,none": 0.25}
results = {"results": {task: scores}, "n-samples": {task: {"original": 500, "effective": config["limit"]}}}
results["lm_eval_version"] = "0.4.99"
Path(config["output_path"]).with_name("results_2026-01-01T00-00-00.json").write_text(json.dumps(results))
"""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in takes the harness's place; the file has a line for each run of it."""
    script = tmp_path / "harness.py"
    script.write_text(HARNESS, encoding="utf-8")
    monkeypatch.setattr(ruler, "_HARNESS", (sys.executable, str(script)))
    monkeypatch.setattr(ruler, "_NEEDED_MODULES", ())
    monkeypatch.setenv("RUNS", str(tmp_path / "runs.jsonl"))
    return tmp_path / "runs.jsonl"


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """A folder."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    return str(folder)


def read_runs(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_cell_has_a_row(runs: Path, tokenizer: str, tmp_path: Path) -> None:
    with FakeServer(str) as server:
        tasks = ["ruler_vt", "niah_single_1"]
        rows = run_ruler(server.url, MODEL, tokenizer, tasks, [4096, 3000], 7, tmp_path / "out", OPTIONS)
    cells = [("ruler_vt", 3000), ("niah_single_1", 3000), ("ruler_vt", 4096), ("niah_single_1", 4096)]
    assert [(row["task"], row["tokens"]) for row in rows] == cells
    assert [row["accuracy"] for row in rows] == [0.03, 0.03, 0.04096, 0.04096]
    assert {row["questions"] for row in rows} == {7}
    assert rows[0]["stderr"] == 0.25
    assert rows[0]["versions"] == {"python": "3", "lm-eval": "0.4.99"}
    assert json.loads((tmp_path / "out" / "ruler.json").read_text(encoding="utf-8")) == rows
    assert len(read_runs(runs)) == 4


def test_the_harness_is_asked_for_one_task_at_one_length(runs: Path, tokenizer: str, tmp_path: Path) -> None:
    with FakeServer(str) as server:
        options = replace(OPTIONS, num_concurrent=3)
        run_ruler(server.url, MODEL, tokenizer, ["ruler_cwe"], [4096], 7, tmp_path / "out", options)
    (run,) = read_runs(runs)
    config = run["config"]
    assert (config["model"], config["tasks"], config["limit"]) == ("local-completions", ["ruler_cwe"], 7)
    assert config["model_args"]["base_url"] == f"{server.url}/v1/completions"
    assert config["model_args"]["tokenizer"] == tokenizer
    assert config["model_args"]["max_length"] == 4096 + MARGIN_TOKENS
    assert config["model_args"]["num_concurrent"] == 3
    assert config["model_args"]["add_bos_token"]
    assert not config["apply_chat_template"]


def test_a_chat_template_brings_the_first_token_itself(runs: Path, tokenizer: str, tmp_path: Path) -> None:
    with FakeServer(str) as server:
        options = replace(OPTIONS, chat_template=True)
        (row,) = run_ruler(server.url, MODEL, tokenizer, ["ruler_cwe"], [4096], 7, tmp_path / "out", options)
    (run,) = read_runs(runs)
    assert run["config"]["apply_chat_template"]
    assert not run["config"]["model_args"]["add_bos_token"]
    assert row["settings"] == {"limit": 7, "chat_template": True}


def test_a_cell_with_a_row_is_not_run_again(runs: Path, tokenizer: str, tmp_path: Path) -> None:
    out_dir = tmp_path / "out"
    with FakeServer(str) as server:
        first = run_ruler(server.url, MODEL, tokenizer, ["ruler_vt"], [4096], 7, out_dir, OPTIONS)
        both = run_ruler(server.url, MODEL, tokenizer, ["ruler_fwe", "ruler_vt"], [4096], 7, out_dir, OPTIONS)
        assert both[1:] == first
        assert [run["config"]["tasks"] for run in read_runs(runs)] == [["ruler_vt"], ["ruler_fwe"]]
        run_ruler(server.url, MODEL, tokenizer, ["ruler_vt"], [4096], 8, out_dir, OPTIONS)
        assert len(read_runs(runs)) == 3


def test_a_failure_keeps_what_was_finished(
    runs: Path, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKEN", "niah_single_2")
    tasks = ["ruler_vt", "niah_single_2", "ruler_fwe"]
    said = (
        r"ended with code 1 for niah_single_2 at 4,096 tokens; it needs the data set baber.*\n.*samples\nno connection"
    )
    with FakeServer(str) as server:
        with pytest.raises(FlashMemoryError, match=said):
            run_ruler(server.url, MODEL, tokenizer, tasks, [4096], 7, tmp_path / "out", OPTIONS)
        monkeypatch.delenv("BROKEN")
        run_ruler(server.url, MODEL, tokenizer, tasks, [4096], 7, tmp_path / "out", OPTIONS)
    ran = [run["config"]["tasks"][0] for run in read_runs(runs)]
    assert ran.count("ruler_vt") == 1
    assert ran.count("niah_single_2") == 2


def test_cells_may_run_at_once(runs: Path, tokenizer: str, tmp_path: Path) -> None:
    options = replace(OPTIONS, num_processes=3)
    with FakeServer(str) as server:
        rows = run_ruler(server.url, MODEL, tokenizer, OFFLINE_TASKS, [4096], 7, tmp_path / "out", options)
    assert [row["task"] for row in rows] == list(OFFLINE_TASKS)
    assert len(read_runs(runs)) == len(OFFLINE_TASKS)


def test_only_tasks_with_essays_look_for_the_sentence_splitter(
    runs: Path, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NLTK_DATA", "/own")
    with FakeServer(str) as server:
        tasks = ["ruler_vt", "niah_single_2"]
        run_ruler(server.url, MODEL, tokenizer, tasks, [4096], 7, tmp_path / "out", OPTIONS)
    offline, essays = (run["nltk"].split(os.pathsep) for run in read_runs(runs))
    assert essays == ["/own"]
    assert offline[1:] == ["/own"]
    assert (Path(offline[0]) / "tokenizers" / "punkt_tab").is_dir()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tasks": ["niah"]}, "tasks are niah: allowed without a download are niah_single_1, "),
        ({"tasks": []}, "tasks are none: allowed"),
        ({"lengths": [4096, 1024]}, r"lengths are \[4096, 1024\]: allowed are 2048 tokens or more"),
        ({"lengths": [MAX_MODEL_LEN]}, f"lengths are .*: allowed are up to {MAX_MODEL_LEN - MARGIN_TOKENS}"),
        ({"limit": 0}, "limit is 0: allowed is 1 or more"),
        ({"options": replace(OPTIONS, num_processes=0)}, "num_processes is 0: allowed is 1 or more"),
        ({"model": "other"}, "model is 'other': allowed is what"),
    ],
)
def test_bad_arguments_are_refused(
    changed: dict[str, Any], said: str, runs: Path, tokenizer: str, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"model": MODEL, "tokenizer": tokenizer, "out_dir": tmp_path / "out"}
    arguments |= {"tasks": ["ruler_vt"], "lengths": [4096], "limit": 7, "options": OPTIONS}
    with FakeServer(str) as server, pytest.raises(ConfigError, match=said):
        run_ruler(server.url, **arguments | changed)
    assert not runs.exists()


def test_a_missing_harness_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ruler, "_NEEDED_MODULES", ("json", "absent_harness"))
    with pytest.raises(ConfigError, match=r"absent_harness not installed: pip install 'flashmemory-vllm\[eval\]'"):
        run_ruler("http://127.0.0.1:1", MODEL, "t", ["ruler_vt"], [4096], 7, tmp_path, OPTIONS)


def test_the_names_are_those_of_the_harness() -> None:
    harness = importlib.util.find_spec("lm_eval")
    if harness is None or harness.origin is None:
        pytest.skip("lm-eval is not installed")
    group = Path(harness.origin).parent / "tasks" / "ruler" / "ruler.yaml"
    tasks = yaml.safe_load(group.read_text(encoding="utf-8"))["task"]
    assert sorted([*OFFLINE_TASKS, *DOWNLOADS]) == sorted(tasks)
