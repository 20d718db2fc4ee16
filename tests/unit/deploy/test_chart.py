"""The Helm chart: its values and schema agree, and what Helm makes of them is what a server needs."""

import json
import re
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from flashmemory_vllm import __version__
from flashmemory_vllm.config import FlashMemoryConfig
from tests.unit.deploy.chart import CHART, RefusedError, lint, render
from tests.unit.deploy.queries import ALERTS, DASHBOARDS
from tests.unit.deploy.serve import parse_arguments

VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
TEMPLATES = "".join(path.read_text() for path in sorted((CHART / "templates").iterdir()))
MODEL: dict[str, Any] = {"model": "Qwen/Qwen3-8B"}
MONITORING: dict[str, Any] = {name: {"enabled": True} for name in ("serviceMonitor", "prometheusRule", "dashboards")}
SLIPS: list[dict[str, Any]] = [
    {"hostMemory": 64},
    {"hostMemoryGib": 0},
    {"tensorParallelSize": 1.5},
    {"flashmemory": {"resident_ration": 0.2}},
    # The chart sizes the container by hostMemoryGib
    {"flashmemory": {"host_memory_gib": 8}},
    {"extraArgs": ["--attention-backend=FLASH_ATTN"]},
    {"probes": {"startup": 3}},
    {"serviceMonitor": {"interval": "often"}},
]


def merged(values: dict[str, Any]) -> dict[str, Any]:
    """The chart's values with a user's over them, as Helm merges them."""
    return VALUES | {
        name: {**VALUES[name], **value} if isinstance(VALUES.get(name), dict) else value
        for name, value in values.items()
    }


def leaves(values: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted path of every value that has no named parts."""
    paths: set[str] = set()
    for name, value in values.items():
        is_section = isinstance(value, dict) and value and name != "labels"
        paths |= leaves(value, f"{prefix}{name}.") if is_section else {f"{prefix}{name}"}
    return paths


def resource(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The one resource of a kind."""
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


def test_versions_follow_the_packages() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)


def test_the_charts_own_values_fit_the_schema() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.validate(VALUES, SCHEMA, jsonschema.Draft7Validator)
    assert set(VALUES) == set(SCHEMA["properties"]) - {"global"}


@pytest.mark.parametrize("values", SLIPS, ids=json.dumps)
def test_the_schema_refuses_a_slip(values: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(merged(values), SCHEMA, jsonschema.Draft7Validator)


def test_the_schema_knows_our_options() -> None:
    allowed = SCHEMA["properties"]["flashmemory"]["propertyNames"]["enum"]
    assert set(allowed) == set(FlashMemoryConfig.model_fields) - {"host_memory_gib"}


def test_templates_use_every_value_and_no_other() -> None:
    used = set(re.findall(r"\.Values\.([A-Za-z]+(?:\.[A-Za-z]+)*)", TEMPLATES))
    assert used == leaves(VALUES)


def test_dashboards_and_alerts_are_links_to_the_only_copy() -> None:
    """Helm reads nothing outside of a chart but follows links, and packs what they point to."""
    files = CHART / "files"
    assert (files / "alerts.yml").resolve() == ALERTS.resolve()
    linked = sorted((files / "dashboards").iterdir())
    assert [path.resolve() for path in linked] == [path.resolve() for path in DASHBOARDS]
    assert all(path.is_symlink() for path in [files / "alerts.yml", *linked])


def test_helms_linter_is_content() -> None:
    lint(MODEL | MONITORING)


@pytest.mark.parametrize("values", [{}, *(MODEL | values for values in SLIPS)], ids=json.dumps)
def test_helm_refuses_a_slip(values: dict[str, Any]) -> None:
    with pytest.raises(RefusedError):
        render(values)


@pytest.mark.parametrize(("host_gib", "drain", "shards"), [(64, 60, 1), (900.5, 0, 8)])
def test_a_pod_has_memory_for_its_pool_and_time_to_unpin_it(host_gib: float, drain: int, shards: int) -> None:
    values = MODEL | {"hostMemoryGib": host_gib, "shutdown": {"drainSeconds": drain}, "tensorParallelSize": shards}
    pod = resource(render(values), "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    limits = container["resources"]["limits"]
    assert container["resources"]["requests"] == limits
    assert limits["nvidia.com/gpu"] == shards
    assert int(limits["memory"].removesuffix("Gi")) >= host_gib + VALUES["systemMemoryGib"] + VALUES["shmGib"]
    arguments, options = parse_arguments(container["args"])
    assert (arguments.tensor_parallel_size, options.host_memory_gib) == (shards, host_gib)
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    unpin = int(environment["VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS"])
    assert unpin >= host_gib
    assert drain + unpin <= arguments.shutdown_timeout < pod["terminationGracePeriodSeconds"]


def test_probes_wait_for_a_slow_start_and_ask_the_served_port() -> None:
    documents = render(MODEL | {"probes": {"startupMinutes": 7, "periodSeconds": 8}})
    (container,) = resource(documents, "Deployment")["spec"]["template"]["spec"]["containers"]
    probes = [container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")]
    assert {probe["httpGet"]["path"] for probe in probes} == {"/health"}
    assert {probe["httpGet"]["port"] for probe in probes} == {"http"}
    assert container["ports"] == [{"name": "http", "containerPort": 8000}]
    assert 7 * 60 <= probes[0]["periodSeconds"] * probes[0]["failureThreshold"] < 7 * 60 + 8


def test_options_of_the_user_reach_the_server() -> None:
    values = MODEL | {
        "flashmemory": {"resident_ratio": 0.2, "selector": "exact"},
        "extraArgs": ["--max-model-len", "131072"],
        "huggingFaceSecret": "hub",
        "cache": {"existingClaim": "weights"},
    }
    pod = resource(render(values), "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    arguments, options = parse_arguments(container["args"])
    assert (arguments.model_tag, arguments.port, arguments.max_model_len) == (MODEL["model"], 8000, 131072)
    assert (options.host_memory_gib, options.resident_ratio, options.selector) == (64, 0.2, "exact")
    assert container["env"][-1]["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "HF_TOKEN"}
    claims = [volume.get("persistentVolumeClaim") for volume in pod["volumes"]]
    assert {"claimName": "weights"} in claims


def test_every_selector_finds_its_pods_and_service() -> None:
    documents = render(MODEL | MONITORING)
    deployment, service = resource(documents, "Deployment"), resource(documents, "Service")
    pod_labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= pod_labels
    assert service["spec"]["selector"].items() <= pod_labels
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert service["spec"]["ports"][0]["targetPort"] in {port["name"] for port in container["ports"]}
    monitor = resource(documents, "ServiceMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]


def test_monitoring_is_that_of_this_repository() -> None:
    documents = render(MODEL | MONITORING)
    assert resource(documents, "PrometheusRule")["spec"] == yaml.safe_load(ALERTS.read_text())
    boards = [document for document in documents if document["kind"] == "ConfigMap"]
    assert len(boards) == len(DASHBOARDS)
    shown = {name: json.loads(text) for board in boards for name, text in board["data"].items()}
    assert shown == {f"flashmemory-{path.name}": json.loads(path.read_text()) for path in DASHBOARDS}


def test_without_the_operators_types_only_core_resources_are_made() -> None:
    assert {document["kind"] for document in render(MODEL)} == {"Deployment", "Service"}
