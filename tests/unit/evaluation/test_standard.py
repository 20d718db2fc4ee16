"""Rows of standard benchmarks, and what is asked of a server first."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event

import pytest

from flashmemory_vllm.errors import ConfigError
from flashmemory_vllm.evaluation.standard import (
    StandardRow,
    api_url,
    load_rows,
    open_client,
    read_max_model_len,
    run_all,
    save_rows,
)
from tests.unit.evaluation.fake_server import MAX_MODEL_LEN, MODEL, FakeServer

ROW = StandardRow(
    suite="ruler",
    task="ruler_vt",
    tokens=4096,
    questions=500,
    accuracy=0.5,
    model="m",
    tokenizer="t",
    settings={"limit": None, "chat_template": False},
    command="command",
    commit="commit",
    gpu="gpu",
    versions={"lm-eval": "0.4"},
)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "out" / "ruler.json"
    assert load_rows(path) == []
    save_rows(path, [ROW, replace(ROW, stderr=0.1, unparsable=2)])
    assert load_rows(path) == [ROW, replace(ROW, stderr=0.1, unparsable=2)]
    assert [file.name for file in path.parent.iterdir()] == ["ruler.json"]


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"suite": "ruler"}]', encoding="utf-8")
    with pytest.raises(ConfigError, match="allowed is a JSON list of objects with suite, task, tokens"):
        load_rows(path)


def test_a_cell_is_what_was_asked_not_what_came_out() -> None:
    assert replace(ROW, accuracy=0.0, commit="other", settings=dict(reversed(ROW.settings.items()))).cell == ROW.cell
    others = [replace(ROW, tokens=8192), replace(ROW, tokenizer="u"), replace(ROW, settings={"limit": 2})]
    assert ROW.cell not in {other.cell for other in others}


@pytest.mark.parametrize("base_url", ["http://host:8000", "http://host:8000/", "http://host:8000/v1/"])
def test_both_forms_of_a_url_are_taken(base_url: str) -> None:
    assert api_url(base_url) == "http://host:8000/v1"


def test_a_server_tells_how_long_prompts_may_be() -> None:
    with FakeServer(str) as server, open_client(server.url, 10) as client:
        assert read_max_model_len(client, MODEL) == MAX_MODEL_LEN
        with pytest.raises(ConfigError, match=f"model is 'other': allowed is what .* serves, {MODEL}"):
            read_max_model_len(client, "other")


def test_a_server_that_does_not_tell_is_refused() -> None:
    with (
        FakeServer(str, None) as server,
        open_client(server.url, 10) as client,
        pytest.raises(ConfigError, match="does not tell max_model_len"),
    ):
        read_max_model_len(client, MODEL)


def test_a_server_that_is_not_there_is_refused() -> None:
    with FakeServer(str) as server:
        url = server.url
    with open_client(url, 10) as client, pytest.raises(ConfigError, match=f"base_url is {url}/v1/: no list of models"):
        read_max_model_len(client.with_options(max_retries=0), MODEL)


def test_functions_run_at_once() -> None:
    both = [Event(), Event()]

    def meet(mine: Event, other: Event) -> bool:
        mine.set()
        return other.wait(10)

    assert list(run_all([lambda: meet(*both), lambda: meet(*reversed(both))], 2)) == [True, True]


def test_a_failure_is_raised_after_what_still_runs_and_stops_the_rest() -> None:
    failed = Event()
    started: list[int] = []

    def finish() -> int:
        failed.wait(10)
        return -1

    def fail() -> int:
        failed.set()
        raise ValueError("broken")

    def late(number: int) -> int:
        started.append(number)
        time.sleep(0.02)
        return number

    functions: list[Callable[[], int]] = [finish, fail, *(partial(late, number) for number in range(100))]
    with pytest.raises(ValueError, match="broken"):
        list(run_all(functions, 2))
    assert len(started) < 100


def test_results_before_a_failure_are_given() -> None:
    def fail() -> int:
        raise ValueError("broken")

    results = run_all([lambda: 1, lambda: 2, fail], 1)
    assert {next(results), next(results)} == {1, 2}
    with pytest.raises(ValueError, match="broken"):
        next(results)
