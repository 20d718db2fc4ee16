"""The load generator gets what the scenario says, and what it saved becomes fields of a row."""

import json
import sys
import textwrap
from pathlib import Path

import pytest

from flashmemory_vllm.benchmark.serving_client import ServingClient, figures_of, trace_of, words
from flashmemory_vllm.errors import FlashMemoryError
from tests.unit.benchmark.serving_twins import LOAD, make_cell, make_result


def make_client(folder: Path, code: str) -> ServingClient:
    """A client whose `vllm` runs the given code."""
    program = folder / "vllm"
    program.write_text(f"#!{sys.executable}\nimport json, sys\n{textwrap.dedent(code)}")
    program.chmod(0o755)
    return ServingClient("model", folder / "log", program)


SAVING = f"""
    def value(name): return sys.argv[sys.argv.index(name) + 1]
    print(" ".join(sys.argv[1:]))
    with open(value("--result-dir") + "/" + value("--result-filename"), "w") as file:
        json.dump({make_result()!r}, file)
"""


def test_what_was_saved_is_the_row_and_what_was_printed_is_kept(tmp_path: Path) -> None:
    figures = make_client(tmp_path, SAVING).send(make_cell(), "http://here:1")
    assert figures["goodput_per_s"] == 1.5
    assert (figures["ttft_p50_ms"], figures["itl_p99_ms"]) == (50.0, 99.0)
    assert (figures["completed"], figures["seconds"], figures["input_tokens"]) == (4, 2.0, 400)
    assert (tmp_path / "log").read_text().startswith("bench serve --backend vllm --base-url http://here:1 ")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('ValueError: no such dataset'); sys.exit(1)", "ValueError: no such dataset"),
        ("sys.exit(3)", "ended with code 3"),
        ("", "ended with code 0"),
        ("import time; time.sleep(60)", "given up after 1 s"),
    ],
)
def test_a_client_that_fails_says_why(code: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(FlashMemoryError, match=said):
        make_client(tmp_path, code).send(make_cell(LOAD | {"time_limit_s": 1.0}), "http://here:1")


def test_an_answer_to_nobody_is_no_measurement() -> None:
    with pytest.raises(FlashMemoryError, match="no request was answered: OSError: gone"):
        figures_of(make_result(completed=0, errors=["", "Traceback\n  x\nOSError: gone\n"]))


def test_options_follow_the_load(tmp_path: Path) -> None:
    client = ServingClient("model")
    load = LOAD | {"shared_prefix_tokens": 30, "spread": 0.25, "max_concurrency": 3, "client": {"seed": 5}}
    options = client.options(make_cell(load, ttft_limit_ms=900.0), "u", tmp_path)
    assert options["random-prefix-len"] + options["random-input-len"] == 100
    assert (options["random-output-len"], options["random-range-ratio"]) == (20, 0.25)
    assert options["goodput"] == ["tpot:50", "ttft:900"]
    assert (options["max-concurrency"], options["seed"]) == (3, 5)
    assert "request-rate" not in options
    custom = {"name": "l", "requests": 4, "request_rate": 2.5, "client": {"dataset-name": "custom"}}
    options = client.options(make_cell(custom), "u", tmp_path)
    assert (options["dataset-name"], options["request-rate"]) == ("custom", 2.5)
    assert "random-input-len" not in options


def test_lengths_of_a_file_become_a_trace_without_common_prompts(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_text("".join(f'{{"input_length": {n}, "output_length": {n + 1}}}\n' for n in (7, 40, 9)))
    cell = make_cell({"name": "l", "requests": 2, "lengths": str(path)})
    lines = [json.loads(line) for line in trace_of(cell).splitlines()]
    assert [(line["input_length"], line["output_length"]) for line in lines] == [(7, 8), (40, 41)]
    assert lines[0]["hash_ids"] != lines[1]["hash_ids"]
    options = ServingClient("model").options(cell, "u", tmp_path)
    # One chunk holds the longest prompt
    assert options["timed-trace-chunk-hash-size"] == 40


def test_options_as_a_command_line() -> None:
    assert words({"a": 1, "flag": True, "off": False, "two": [1, "b"], "json": {"x": 1}}) == [
        *("--a", "1", "--flag", "--two", "1", "b"),
        *("--json", '{"x": 1}'),
    ]
