"""`flashmemory doctor` on this machine, and with a plugin that vLLM would not load."""

import json
import sys

import pytest

from flashmemory_vllm.cli import app, doctor
from flashmemory_vllm.doctor.finding import Finding


def test_this_machine_would_serve(capsys: pytest.CaptureFixture[str]) -> None:
    """Everything on standard output is the findings: vLLM's own log lines go elsewhere."""
    assert app.main(["doctor", "--json"]) == 0
    findings = [Finding(**found) for found in json.loads(capsys.readouterr().out)]
    checks = {finding.check: finding for finding in findings}
    assert checks["vLLM"].found.startswith("0.32.")
    assert {"vLLM's seams", "model runner", "general_plugins", "host memory", "shared memory"} <= set(checks)
    assert len(checks) == len(findings)


def test_a_failed_check_is_exit_code_1_and_in_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda: iter([Finding("vLLM", "fail", "0.31.0", "pip install vllm")]))
    assert app.main(["doctor"]) == 1
    assert capsys.readouterr().out == "fail  vLLM  0.31.0\n            -> pip install vllm\n"


def test_a_machine_without_vllm_is_still_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "flashmemory_vllm.plugin.doctor", raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)
    first, *others = doctor.diagnose()
    assert (first.check, first.status) == ("vLLM", "fail")
    assert "host memory" in {finding.check for finding in others}
