"""The PromQL of the dashboards and alerts, and what a query says about the metrics it reads."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[3] / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana").glob("*.json"))
ALERTS = DEPLOY / "prometheus" / "alerts.yml"

_METRIC = re.compile(r"\b(?:flashmemory|vllm):[a-z0-9_]+")
_RANGE_FUNCTION = re.compile(r"\b(?:rate|increase)\($")
_MATCHED_LABEL = re.compile(r'([a-z_]+)\s*(?:=~|!~|!=|=)\s*"')
_GROUPED_LABELS = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression.

    Attributes:
        place: file and panel or alert, for messages.
        expression: as written.
        unit: Grafana's unit of the panel, empty for an alert.
    """

    place: str
    expression: str
    unit: str = ""

    def metrics(self) -> Iterator[tuple[str, bool]]:
        """Each metric that is read, and whether its growth is asked for rather than its value."""
        for match in _METRIC.finditer(self.expression):
            yield match.group(), bool(_RANGE_FUNCTION.search(self.expression[: match.start()]))

    def labels(self) -> set[str]:
        """Every label that is matched, grouped by or joined on."""
        grouped = ",".join(_GROUPED_LABELS.findall(self.expression)).replace(" ", "").split(",")
        return {*_MATCHED_LABEL.findall(self.expression), *grouped} - {""}

    def resolved(self) -> str:
        """What Prometheus gets once Grafana has put its variables in."""
        return re.sub(r"\$[a-z_]+", ".*", self.expression.replace("$__rate_interval", "5m"))


def panels(path: Path) -> list[dict[str, Any]]:
    """The panels of a dashboard that show something."""
    return [panel for panel in json.loads(path.read_text())["panels"] if panel["type"] != "row"]


def dashboard_queries() -> Iterator[Query]:
    """Every query of every panel."""
    for path in DASHBOARDS:
        for panel in panels(path):
            unit = panel["fieldConfig"]["defaults"]["unit"]
            for target in panel["targets"]:
                yield Query(f"{path.name}: {panel['title']}", target["expr"], unit)


def variable_queries() -> Iterator[Query]:
    """What fills the dashboards' drop-down lists."""
    for path in DASHBOARDS:
        for variable in json.loads(path.read_text())["templating"]["list"]:
            if variable["type"] == "query":
                yield Query(f"{path.name}: ${variable['name']}", variable["query"]["query"])


def alert_rules() -> list[dict[str, Any]]:
    """Every alert."""
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def alert_queries() -> Iterator[Query]:
    """The condition of every alert."""
    for rule in alert_rules():
        yield Query(f"{ALERTS.name}: {rule['alert']}", rule["expr"])
