"""What the doctor says of vLLM's plugin groups, version and seams; vLLM and entry points are real."""

from pathlib import Path

import pytest
from vllm import envs
from vllm.triton_utils import HAS_TRITON

from flashmemory_vllm.errors import UnsupportedError
from flashmemory_vllm.plugin import doctor

GENERAL, EARLY, STATS, ENDPOINTS = doctor.GROUPS


def install(folder: Path, name: str, group: str, value: str) -> None:
    """A distribution with one plugin of our name."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nflashmemory = {value}\n")


@pytest.mark.parametrize(
    ("group", "allowed", "status"),
    [
        (GENERAL, None, "ok"),
        (GENERAL, ["flashmemory"], "ok"),
        (GENERAL, ["lora_resolver"], "fail"),
        # vLLM does not strip blanks
        (GENERAL, ["lora_resolver", " flashmemory"], "fail"),
        (GENERAL, [""], "fail"),
        (EARLY, ["lora_resolver"], "warn"),
        (STATS, ["lora_resolver"], "fail"),
        (ENDPOINTS, None, "ok"),
        (ENDPOINTS, ["lora_resolver"], "warn"),
    ],
)
def test_the_allowlist_decides_what_is_loaded(group: str, allowed: list[str] | None, status: str) -> None:
    assert doctor.plugin(group, allowed).status == status


@pytest.mark.parametrize("allowed", [["lora_resolver"], [""]])
def test_the_remedy_is_an_allowlist_that_vllm_reads_right(allowed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    remedy = doctor.plugin(GENERAL, allowed).remedy
    name, _, value = remedy.partition("=")
    monkeypatch.setenv(name, value)
    assert envs.VLLM_PLUGINS is not None
    assert set(envs.VLLM_PLUGINS) == {*filter(None, allowed), "flashmemory"}
    assert doctor.plugin(GENERAL, envs.VLLM_PLUGINS).status == "ok"


def test_another_plugin_of_our_name_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "stranger", GENERAL, "stranger:register")
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = doctor.plugin(GENERAL, None)
    assert finding.status == "fail"
    assert "stranger:register" in finding.found


def test_a_plugin_that_cannot_be_loaded_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM only logs it and goes on without."""
    install(tmp_path, "broken", GENERAL, "no_such_module:register")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    finding = doctor.plugin(GENERAL, None)
    assert (finding.status, "no_such_module" in finding.found) == ("fail", True)


def test_a_plugin_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    for group, status in ((GENERAL, "fail"), (EARLY, "warn")):
        finding = doctor.plugin(group, None)
        assert (finding.status, finding.found.split(":")[0]) == (status, "not installed")


@pytest.mark.parametrize(("check", "function"), [("vLLM", "check_vllm_version"), ("vLLM's seams", "check_seams")])
def test_a_vllm_that_does_not_fit_fails(check: str, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise UnsupportedError("what differs")

    monkeypatch.setattr(doctor, function, refuse)
    failed = {finding.check: finding.found for finding in doctor.vllm_findings() if finding.status == "fail"}
    assert failed == {check: "what differs"}


def test_the_runner_asked_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    finding = doctor.runner()
    assert (finding.status, finding.found) == ("ok", "V1 (VLLM_USE_V2_MODEL_RUNNER=0)")


@pytest.mark.skipif(HAS_TRITON, reason="needs a machine without Triton")
def test_a_runner_that_vllm_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    finding = doctor.runner()
    assert finding.status == "fail"
    assert "requires Triton" in finding.found
