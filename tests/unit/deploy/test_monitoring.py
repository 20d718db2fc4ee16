"""Dashboards and alerts ask for metrics that exist, in the way their kind and unit allow."""

import importlib.util
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from flashmemory_vllm.observability.metrics import METRICS, PREFIX, MetricSpec
from tests.unit.deploy.queries import (
    ALERTS,
    DASHBOARDS,
    DEPLOY,
    Query,
    alert_queries,
    alert_rules,
    dashboard_queries,
    panels,
    variable_queries,
)

OURS = {spec.full_name: spec for spec in METRICS}
QUERIES = [*dashboard_queries(), *alert_queries()]
# Those of Prometheus itself, of a histogram's buckets, and of vLLM's finished requests
OTHER_LABELS = {"job", "instance", "le", "finished_reason"}
OPERATE = Path(__file__).parents[3] / "docs" / "operate.md"
DIMENSIONLESS = {"short", "ops", "reqps"}


def by_place(query: Query) -> str:
    return query.place


def vllm_metrics() -> set[str]:
    """Names of vLLM's own metrics, as its source declares them."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    sources = (Path(spec.origin).parent / "v1" / "metrics").glob("*.py")
    return {name for source in sources for name in re.findall(r'"(vllm:[a-z0-9_]+)"', source.read_text())}


def declared_name(name: str, declared: set[str]) -> str | None:
    """The declared metric that a series belongs to; the client adds a suffix to counters and histograms."""
    candidates = [name, *(name.removesuffix(suffix) for suffix in ("_total", "_bucket", "_sum", "_count"))]
    return next((candidate for candidate in candidates if candidate in declared), None)


def our_metric(name: str) -> MetricSpec | None:
    """The metric of ours that a series belongs to."""
    return OURS.get(declared_name(name, set(OURS)) or "")


def allowed_units(query: Query) -> set[str]:
    """Grafana's units that fit what the query computes from our metrics; over the number of workers they stay."""
    metrics = [spec for name, _ in query.metrics() if (spec := our_metric(name)) is not None]
    units = {spec.unit for spec in metrics} - {"workers"}
    if any(spec.kind == "histogram" for spec in metrics):
        return {"s"} if units == {"seconds"} else {"short"}
    grows = any(is_growth for _, is_growth in query.metrics())
    if not units:
        return DIMENSIONLESS | {"percentunit", "s"}
    if units == {"bytes"}:
        return {"Bps"} if grows else {"bytes"}
    if units == {"seconds"}:
        return {"percentunit"} if grows else {"s"}
    if units == {"bytes", "blocks"}:
        return {"bytes"}
    return {"percentunit", "short"} if "/" in query.expression else DIMENSIONLESS


@pytest.mark.parametrize("query", [*QUERIES, *variable_queries()], ids=by_place)
def test_every_metric_exists(query: Query) -> None:
    declared = vllm_metrics()
    names = [name for name, _ in query.metrics()]
    assert names
    unknown = [name for name in names if name.startswith(PREFIX) and our_metric(name) is None]
    unknown += [name for name in names if not name.startswith(PREFIX) and declared_name(name, declared) is None]
    assert unknown == []


@pytest.mark.parametrize("query", QUERIES, ids=by_place)
def test_growth_is_asked_of_counters_and_values_of_gauges(query: Query) -> None:
    wrong = [
        name
        for name, is_growth in query.metrics()
        if (spec := our_metric(name)) is not None and is_growth == (spec.kind == "gauge")
    ]
    assert wrong == []


@pytest.mark.parametrize("query", QUERIES, ids=by_place)
def test_labels_are_those_that_the_metrics_have(query: Query) -> None:
    ours = {label for spec in METRICS for label in spec.labels}
    assert query.labels() <= ours | OTHER_LABELS


@pytest.mark.parametrize("query", list(dashboard_queries()), ids=by_place)
def test_a_panels_unit_fits_its_query(query: Query) -> None:
    assert query.unit in allowed_units(query)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_a_dashboard_is_complete(path: Path) -> None:
    board = json.loads(path.read_text())
    assert board["uid"] == f"flashmemory-{path.stem}"
    assert [variable["name"] for variable in board["templating"]["list"]] == [
        "datasource",
        "model_name",
        "instance",
        "engine",
    ]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels(path):
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert {panel["datasource"]["uid"], *(target["datasource"]["uid"] for target in panel["targets"])} == {
            "${datasource}"
        }
    for one, other in itertools.combinations(board["panels"], 2):
        assert not overlap(one["gridPos"], other["gridPos"]), (one["title"], other["title"])


def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    """Whether two panels cover the same cell of Grafana's grid, which is 24 wide."""
    assert max(one["x"] + one["w"], other["x"] + other["w"]) <= 24
    return all(
        one[start] < other[start] + other[size] and other[start] < one[start] + one[size]
        for start, size in ("xw", "yh")
    )


def test_every_metric_of_ours_is_on_a_dashboard() -> None:
    metrics = [our_metric(name) for query in dashboard_queries() for name, _ in query.metrics()]
    shown = {spec.full_name for spec in metrics if spec is not None}
    # The dashboards divide its two parts, which is exact over several engines
    assert set(OURS) - shown == {f"{PREFIX}resident_ratio"}


@pytest.mark.parametrize("rule", alert_rules(), ids=lambda rule: rule["alert"])
def test_an_alert_says_what_to_do(rule: dict[str, Any]) -> None:
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert page == "docs/operate.md"
    assert anchor in {heading.lower() for heading in re.findall(r"^#+ (\w+)$", OPERATE.read_text(), re.MULTILINE)}
    assert rule["labels"]["severity"] in {"warning", "critical"}


def run_promtool(*arguments: str | Path) -> None:
    """Run Prometheus' own checker and fail with what it says."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: it comes with Prometheus")
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_rules_and_configuration() -> None:
    run_promtool("check", "rules", ALERTS)
    run_promtool("check", "config", DEPLOY / "prometheus" / "prometheus.yml")


def test_promtool_passes_the_alerts_own_tests() -> None:
    run_promtool("test", "rules", DEPLOY / "prometheus" / "alerts_test.yml")


def test_promtool_can_parse_every_query_of_the_dashboards(tmp_path: Path) -> None:
    rules = [{"record": f"panel_{index}", "expr": query.resolved()} for index, query in enumerate(dashboard_queries())]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    run_promtool("check", "rules", file)


def test_every_alert_has_a_test() -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in alert_rules()}
