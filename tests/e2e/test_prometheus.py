"""A real Prometheus with our configuration scrapes a server under load: metrics, alerts and dashboards have data."""

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from flashmemory_vllm.cli.server import Server
from flashmemory_vllm.evaluation.vocabulary import BOS, encode
from flashmemory_vllm.observability.metrics import PREFIX, SERIES
from tests.e2e.questions import make_questions
from tests.unit.deploy.queries import ALERTS, DEPLOY, Query, alert_rules, dashboard_queries, variable_queries

CONFIG = DEPLOY / "prometheus" / "prometheus.yml"
WAIT_SECONDS = 300
NUM_REQUESTS = 4
# Gauges of what there is in total
_TOTALS = ("slots_total", "host_blocks_total", "native_blocks_total")


def find_tool(name: str) -> str:
    """Path of one of Prometheus' programs; the test is skipped without it."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed: it comes with Prometheus")
    return path


def wait_for(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true in time."""
    end = time.monotonic() + WAIT_SECONDS
    while not (is_met := condition()) and time.monotonic() < end:
        time.sleep(0.5)
    return is_met


def write_config(server: Server, folder: Path) -> Path:
    """The shipped configuration with another address, the alerts where they are, and no long waits."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(ALERTS)]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [server.url.removeprefix("http://")]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Its HTTP API."""
    program, folder = find_tool("prometheus"), tmp_path_factory.mktemp("prometheus")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [program, f"--config.file={write_config(server, folder)}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://{address}/api/v1") as client:
            assert wait_for(lambda: is_up(client)), (folder / "log").read_text()
            load(server)
            yield client
    finally:
        process.terminate()
        process.wait()


def is_up(client: httpx.Client) -> bool:
    """Whether Prometheus runs and has scraped the server."""
    try:
        return any(float(sample["value"][1]) == 1 for sample in ask(client, "up"))
    except httpx.HTTPError:  # it does not listen yet, or says that it is not ready
        return False


def ask(client: httpx.Client, expression: str) -> list[dict[str, Any]]:
    """The samples that a query has now."""
    answer = client.get("/query", params={"query": expression}).raise_for_status().json()
    samples: list[dict[str, Any]] = answer["data"]["result"]
    return samples


def load(server: Server) -> None:
    """Long prompts, several at a time."""
    questions = make_questions("late", 4096, NUM_REQUESTS, seed=7)
    prompts = [[BOS, *encode(question.prompt)] for question in questions]
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        list(pool.map(lambda prompt: server.complete(prompt, max_tokens=64), prompts))


def test_every_documented_metric_is_scraped(prometheus: httpx.Client) -> None:
    names = prometheus.get("/label/__name__/values").raise_for_status().json()["data"]
    assert {PREFIX + key.partition("{")[0] for key in SERIES} <= set(names)
    labels = {"job", "instance", "model_name", "engine", "__name__"}
    assert all(set(sample["metric"]) == labels for sample in ask(prometheus, f"{PREFIX}workers"))


def test_what_was_counted_arrives(prometheus: httpx.Client) -> None:
    def value(expression: str) -> float:
        (sample,) = ask(prometheus, expression)
        return float(sample["value"][1])

    assert wait_for(lambda: value(f"sum({PREFIX}requests_sparse_total)") >= NUM_REQUESTS)
    assert value(f"{PREFIX}workers") == 1
    bucket, count = (f"{PREFIX}selection_latency_seconds{end}" for end in ('_bucket{le="+Inf"}', "_count"))
    assert wait_for(lambda: value(count) >= NUM_REQUESTS)
    assert value(bucket) == value(count)


def test_every_alert_is_loaded_and_can_be_evaluated(prometheus: httpx.Client) -> None:
    def rules() -> list[dict[str, Any]]:
        groups = prometheus.get("/rules").raise_for_status().json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    assert wait_for(lambda: {rule["health"] for rule in rules()} == {"ok"}), rules()
    assert {rule["name"] for rule in rules()} == {rule["alert"] for rule in alert_rules()}


@pytest.mark.parametrize("query", list(dashboard_queries()), ids=lambda query: query.place)
def test_a_dashboards_query_has_data(prometheus: httpx.Client, query: Query) -> None:
    assert wait_for(lambda: bool(ask(prometheus, query.resolved())))


@pytest.mark.parametrize("query", list(variable_queries()), ids=lambda query: query.place)
def test_a_dashboards_list_has_entries(prometheus: httpx.Client, query: Query) -> None:
    series, label = query.resolved().removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
    samples = ask(prometheus, series)
    assert all(sample["metric"][label] for sample in samples)
    assert samples


def test_promtool_accepts_what_prometheus_was_started_with(server: Server, tmp_path: Path) -> None:
    promtool = find_tool("promtool")
    done = subprocess.run(
        [promtool, "check", "config", str(write_config(server, tmp_path))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_has_nothing_to_say_about_new_metrics(server: Server) -> None:
    text = httpx.get(f"{server.url}/metrics").text
    ours = "".join(f"{line}\n" for line in text.splitlines() if PREFIX in line)
    command = [find_tool("promtool"), "check", "metrics"]
    done = subprocess.run(command, input=ours, capture_output=True, text=True, check=False)
    # The colon is in all of vLLM's names; three gauges tell what there is in total
    complaints = {line for line in done.stderr.splitlines() if not line.endswith("should not contain ':'")}
    suffix = 'non-counter metrics should not have "_total" suffix'
    assert complaints == {f"{PREFIX}{name} {suffix}" for name in _TOTALS}
